"""What the folder of all state holds, by kind."""

import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared.registry.numbering import children
from shared.service.settings import Directories


@dataclass(frozen=True)
class Usage:
    """How much a kind of files takes, and what can be done about it."""

    kind: str
    path: Path
    size_bytes: int
    advice: str


def usage(directories: Directories) -> list[Usage]:
    """Every kind of files below `GPTLOOP_VAR`; nothing is counted twice, or left out."""
    registry = directories.registry
    parts = [
        (
            "versions",
            registry / "versions",
            "`gptloop prune`, GPTLOOP_KEEP_NEWEST, GPTLOOP_KEEP_BEST, GPTLOOP_KEEP_BYTES",
        ),
        ("states", registry / "runs", "`gptloop prune`, GPTLOOP_KEEP_STATES, GPTLOOP_KEEP_RUNS, GPTLOOP_KEEP_BYTES"),
        ("prepared text", directories.data, "goes after 30 days without use; made again when it is missing"),
        ("jobs", directories.redis, "what Redis keeps; jobs that ended go after 30 days"),
        ("logs", directories.log, "may be removed while nothing runs"),
        ("compiled", directories.cache, "may be removed while nothing runs; made again when it is missing"),
    ]
    found = [Usage(kind, path, _size_bytes([path]), advice) for kind, path, advice in parts]
    known = {path for _, path, _ in parts} | {registry}
    others = [path for folder in (directories.var, registry) for path in children(folder) if path not in known]
    return [*found, Usage("other", directories.var, _size_bytes(others), "")]


def _size_bytes(paths: Iterable[Path]) -> int:
    """What files take on the disk, those in folders too; 0 for what is gone or cannot be read, and for links."""
    size_bytes, waiting = 0, list(paths)
    while waiting:
        path = waiting.pop()
        with suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                waiting += path.iterdir()
            elif stat.S_ISREG(found.st_mode):
                # Of a file with holes, only what is there.
                size_bytes += min(found.st_blocks * 512, found.st_size)
    return size_bytes
