"""Reads text from local .txt, .jsonl and .parquet files; the first two may be compressed."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import DataError, InvalidArgument, shown
from trainer_service.text import documents, file_bytes
from trainer_service.text.documents import Counts, Passage
from trainer_service.text.file_bytes import COMPRESSED, Identity

KINDS = (".txt", ".jsonl", ".parquet")
# Parquet has its own compression and cannot be read as a stream.
ENDINGS = (*KINDS, *(kind + packed for kind in KINDS[:2] for packed in COMPRESSED))

OnRead = Callable[[int], None]


@dataclass(frozen=True)
class TextFile:
    """A file that was read once from beginning to end.

    `digest` is the SHA-256 of its decompressed content; `lengths` are the characters of its documents, (N,).
    """

    path: Path
    kind: str
    identity: Identity
    digest: str
    lengths: np.ndarray
    notices: tuple[str, ...]
    on_read: OnRead

    def passages(self) -> Iterator[Passage]:
        """Yields the documents in order; raises `DataError` if the file has changed since it was first read."""
        return _passages(self.path, self.kind, self.identity, Counts(), self.on_read, lambda _: None)


def kind_of(path: Path) -> str:
    """Returns the one of `KINDS` that a file's name stands for; raises `InvalidArgument` for other names."""
    ending = "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:]).lower()
    if ending not in ENDINGS:
        raise InvalidArgument(f"The file {shown(str(path))} cannot be read: its name must end in {', '.join(ENDINGS)}.")
    return ending.removesuffix(path.suffix.lower()) or ending


def check_file(path: Path) -> Identity:
    """Returns the identity of a file; raises `NotFound`, `InvalidArgument` or `DataError` if it cannot be read."""
    identity = file_bytes.identify(path)
    kind_of(path)
    if identity.size_bytes == 0:
        raise DataError(f"The file {shown(str(path))} is empty.")
    with file_bytes.open_bytes(path, identity, lambda _: None) as file:
        file.read(1)
    return identity


def passes(path: Path) -> int:
    """Returns how many times `open_file` reads a file."""
    return 2 if kind_of(path) == ".parquet" else 1


def open_file(path: Path, on_read: OnRead = lambda _: None) -> TextFile:
    """Reads a file from beginning to end.

    `on_read` receives the number of bytes of each read, now and in later readings; an exception from it ends the
    reading. Raises the errors of `check_file`, and `DataError` if the text cannot be read or there is none.
    """
    identity, kind = check_file(path), kind_of(path)
    digest, counts = hashlib.sha256(), Counts()
    if kind == ".parquet":
        for chunk in file_bytes.content(path, identity, on_read):
            digest.update(chunk)
    lengths, characters = array("q"), 0
    for passage in _passages(path, kind, identity, counts, on_read, digest.update):
        characters += len(passage.text)
        if passage.ends_document:
            lengths.append(characters)
            characters = 0
    name = shown(path.name)
    if not lengths:
        fields = f"; a row has the fields {shown(', '.join(counts.fields), 80)}" if counts.fields else ""
        raise DataError(f"The file {name} has no text" + ("." if kind == ".txt" else f' in "text"{fields}.'))
    notices = []
    if kind == ".txt" and not counts.markers:
        notices.append(f"{name} has no <|endoftext|> marker, so the whole file is one document.")
    if counts.empty_rows:
        notices.append(f"{name}: skipped {_rows(counts.empty_rows)} without text.")
    if counts.mended_rows:
        rows = _rows(counts.mended_rows)
        notices.append(f"{name}: replaced lone surrogates (half characters) with U+FFFD in {rows}.")
    return TextFile(path, kind, identity, digest.hexdigest(), np.array(lengths), tuple(notices), on_read)


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count != 1)}"


def _passages(
    path: Path, kind: str, identity: Identity, counts: Counts, on_read: OnRead, on_content: Callable[[bytes], None]
) -> Iterator[Passage]:
    """Yields the documents of a file; passes the content of text files to `on_content`."""

    def observed() -> Iterator[bytes]:
        for chunk in file_bytes.content(path, identity, on_read):
            on_content(chunk)
            yield chunk

    def parts() -> Iterator[documents.Part]:
        match kind:
            case ".parquet":
                with file_bytes.open_bytes(path, identity, on_read) as file:
                    yield from documents.parquet(file, path, counts)
            case ".jsonl":
                yield from documents.json_lines(file_bytes.text(path, observed()), path, counts)
            case _:
                yield from documents.marked(file_bytes.text(path, observed()), counts)

    for passage in documents.passages(parts()):
        on_read(0)  # one read can give many passages
        yield passage
