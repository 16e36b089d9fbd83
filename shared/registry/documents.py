"""JSON objects in object storage that change by compare-and-swap, and the texts of a group in one of them."""

import hashlib
import json
import random
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from shared.errors import CorruptCheckpoint, StoreFailed
from shared.registry.bucket import Bucket, Conflict
from shared.registry.store import Change, Texts

Document = dict[str, Any]

# A change is tried again for this long while others change the same object.
_CHANGE_S = 60.0
_PAUSE_S = 0.02
_MAX_PAUSE_S = 1.0
# How often an object that arrives altered is read again.
_READS = 3


class DocumentTexts(Texts):
    """The texts in a document: the text of each name, and when it was written."""

    def __init__(self, document: Document) -> None:
        self._texts: Mapping[str, list[Any]] = document.get("texts", {})

    def __getitem__(self, name: str) -> str:
        return str(self._texts[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)

    def written_at(self, name: str) -> float:
        """Returns when a text was written."""
        return float(self._texts[name][1]) if name in self._texts else 0.0


def with_texts(document: Document, change: Change) -> Document | None:
    """Returns a document with changed texts; None if nothing changes."""
    changed = change(DocumentTexts(document))
    if not changed:
        return None
    now = time.time()
    texts = dict(document.get("texts", {})) | {name: [text, now] for name, text in changed.items() if text is not None}
    kept = {name: text for name, text in texts.items() if changed.get(name, "") is not None}
    return document | {"texts": kept}


class Documents:
    """The JSON objects of a bucket, each empty until it is first changed. Methods raise as those of `Bucket` do, and
    `CorruptCheckpoint` if one cannot be understood."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def read(self, name: str) -> Document:
        """Returns an object as it is now."""
        return self._read(name)[0]

    def change(self, name: str, change: Callable[[Document], Document | None]) -> Document:
        """Replaces an object by what `change` returns, None for no change, and returns it; no change is lost.

        `change` is called again if another process was faster.
        """
        begin, pause_s = time.monotonic(), _PAUSE_S
        while True:
            document, e_tag = self._read(name)
            changed = change(document)
            if changed is None:
                return document
            # The writer finds its own write by this word.
            content = encoded(changed | {"write": secrets.token_hex(8)})
            try:
                if e_tag is None:
                    self._bucket.create(name, content)
                else:
                    self._bucket.replace(name, content, e_tag)
                return changed
            except Conflict:
                if time.monotonic() - begin > _CHANGE_S:
                    raise StoreFailed(
                        f"The registry {self._bucket.address} cannot be written: others have changed {name} for "
                        f"{_CHANGE_S:.0f} seconds; try again."
                    ) from None
            time.sleep(random.uniform(0, pause_s))
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _read(self, name: str) -> tuple[Document, str | None]:
        try:
            return read_document(self._bucket, name)
        except FileNotFoundError:
            return {}, None


def encoded(document: Document) -> bytes:
    """Returns the content of an object: JSON, with the SHA-256 of its value."""
    value = json.dumps(document, sort_keys=True)
    return json.dumps({"sha256": _sha256(value), "value": document}, sort_keys=True).encode()


def read_document(bucket: Bucket, name: str) -> tuple[Document, str]:
    """Returns the value of an object, empty if its content is, and its e_tag.

    Raises `FileNotFoundError` if it is absent, and `CorruptCheckpoint` if it arrives altered again and again.
    """
    for _ in range(_READS):
        content, e_tag = bucket.read(name)
        if not content:
            return {}, e_tag
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            document = json.loads(content)
            if _sha256(json.dumps(document["value"], sort_keys=True)) == document["sha256"]:
                return dict(document["value"]), e_tag
    raise CorruptCheckpoint(f"{bucket.address}/{name} cannot be understood: it is not what this program writes.")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
