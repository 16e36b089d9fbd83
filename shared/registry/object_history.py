"""The histories of runs in object storage: pieces that never change, which the document of the run lists.

New lines wait in memory until they are synced or old enough, so that a report every few seconds is no request.
"""

import secrets
import time
from dataclasses import dataclass, field

from shared.errors import StoreFailed
from shared.registry.bucket import Bucket
from shared.registry.documents import Document
from shared.registry.fence import Fence
from shared.registry.object_runs import ObjectRuns, without

# Lines wait at most this long for the next one.
_WAIT_S = 30.0
# The next try after a failure.
_RETRY_S = 120.0
# A last piece that is smaller is written again, longer, so that a history has few pieces.
_PIECE_BYTES = 256 << 10
# A reader may have begun with a list of pieces that has changed since.
_READS = 5


@dataclass
class _Waiting:
    content: bytes = b""
    since_s: float = field(default_factory=time.monotonic)


class ObjectHistories:
    """The histories of one registry."""

    def __init__(self, bucket: Bucket, runs: ObjectRuns) -> None:
        self._bucket = bucket
        self._runs = runs
        self._waiting: dict[str, _Waiting] = {}
        # The last piece that was read or written, by the run.
        self._last: dict[str, tuple[str, bytes]] = {}

    def read(self, run: str, start: int) -> bytes:
        """Returns a history from a byte on; raises `FileNotFoundError` if there is none."""
        for left in reversed(range(_READS)):
            document = self._runs.read(run)
            if "history" not in document:
                raise FileNotFoundError(2, "No such history", f"{self._bucket.address}/history/{run}")
            try:
                return self._read(run, document["history"]["pieces"], start)
            except FileNotFoundError:
                if left == 0:
                    raise
        raise AssertionError

    def _read(self, run: str, pieces: list[tuple[str, int]], start: int) -> bytes:
        content, end = b"", 0
        for name, size_bytes in pieces:
            begin, end = end, end + size_bytes
            if end > start:
                content += self._piece(run, name)[max(0, start - begin) :]
        return content

    def _piece(self, run: str, name: str) -> bytes:
        known = self._last.get(run)
        if known is None or known[0] != name:
            known = self._last[run] = (name, self._bucket.read(f"history/{run}/{name}")[0])
        return known[1]

    def append(self, fence: Fence, content: bytes, synced: bool) -> None:
        """Appends to a history, at once if `synced` or after some time."""
        waiting = self._waiting.setdefault(fence.run, _Waiting())
        if not waiting.content:
            waiting.since_s = time.monotonic()
        waiting.content += content
        if waiting.content and (synced or time.monotonic() - waiting.since_s > _WAIT_S):
            try:
                self._write(fence, waiting.content)
            except StoreFailed:
                # Each try takes some seconds, in which training waits.
                waiting.since_s = time.monotonic() + _RETRY_S - _WAIT_S
                if len(waiting.content) > _PIECE_BYTES:
                    waiting.content = b""
                raise
            waiting.content = b""

    def _write(self, fence: Fence, content: bytes) -> None:
        run = fence.run
        document = self._runs.read(run)
        pieces = _pieces(document)
        old = pieces[-1:] if pieces and pieces[-1][1] < _PIECE_BYTES else []
        content = b"".join(self._piece(run, name) for name, _ in old) + content
        self._replace(fence, pieces, [*pieces[: len(pieces) - len(old)], self._put(run, content)])

    def cut(self, fence: Fence, size_bytes: int) -> None:
        """Cuts a history back to its first bytes."""
        self._waiting.pop(fence.run, None)
        pieces = _pieces(self._runs.read(fence.run))
        kept, end = list[tuple[str, int]](), 0
        for name, piece_bytes in pieces:
            begin, end = end, end + piece_bytes
            if end <= size_bytes:
                kept.append((name, piece_bytes))
            elif begin < size_bytes:
                kept.append(self._put(fence.run, self._piece(fence.run, name)[: size_bytes - begin]))
        self._replace(fence, pieces, kept)

    def remove(self, run: str) -> None:
        """Removes a history."""
        pieces = _pieces(self._runs.read(run))
        self._runs.change(run, lambda document: without(document, "history") if "history" in document else None)
        self._bucket.delete(f"history/{run}/{name}" for name, _ in pieces)

    def _put(self, run: str, content: bytes) -> tuple[str, int]:
        name = secrets.token_hex(8)
        self._bucket.upload(f"history/{run}/{name}", content)
        self._last[run] = (name, content)
        return name, len(content)

    def _replace(self, fence: Fence, old: list[tuple[str, int]], new: list[tuple[str, int]]) -> None:
        """Lists other pieces; only the owner of the run does, so nobody else has changed them meanwhile."""

        def change(document: Document) -> Document:
            self._runs.check(fence, document)
            return document | {"history": {"pieces": new, "at": time.time()}}

        self._runs.change(fence.run, change)
        kept = {name for name, _ in new}
        self._bucket.delete(f"history/{fence.run}/{name}" for name, _ in old if name not in kept)


def _pieces(document: Document) -> list[tuple[str, int]]:
    return [(name, size_bytes) for name, size_bytes in document.get("history", {}).get("pieces", [])]
