"""Text in local files: .txt, .jsonl and .parquet, the first two also compressed."""

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.errors import DataError, InvalidArgument, shown
from trainer_service.training import documents, file_bytes
from trainer_service.training.documents import Counts, Passage
from trainer_service.training.file_bytes import COMPRESSED, Identity

KINDS = (".txt", ".jsonl", ".parquet")
# Parquet is compressed within, and cannot be read as a stream.
ENDINGS = (*KINDS, *(kind + packed for kind in KINDS[:2] for packed in COMPRESSED))

OnRead = Callable[[int], None]


@dataclass(frozen=True)
class TextFile:
    """A file that was read through once.

    `digest` is the SHA-256 of its content, decompressed; `lengths` are the characters of its documents, (N,).
    """

    path: Path
    kind: str
    identity: Identity
    digest: str
    lengths: np.ndarray
    notices: tuple[str, ...]
    on_read: OnRead

    def passages(self) -> Iterator[Passage]:
        """The documents in their order; raises `DataError` if the file is not what it was at the first reading."""
        return _passages(self.path, self.kind, self.identity, Counts(), self.on_read, lambda _: None)


def kind_of(path: Path) -> str:
    """What the name says that a file holds: one of `KINDS`; raises `InvalidArgument` for other names."""
    ending = "".join(path.suffixes[-2:] if path.suffix.lower() in COMPRESSED else path.suffixes[-1:]).lower()
    if ending not in ENDINGS:
        raise InvalidArgument(f"The file {shown(str(path))} cannot be read: its name must end in {', '.join(ENDINGS)}.")
    return ending.removesuffix(path.suffix.lower()) or ending


def check_file(path: Path) -> Identity:
    """The identity of a file; raises `NotFound`, `InvalidArgument` or `DataError` if it cannot be read."""
    identity = file_bytes.identify(path)
    kind_of(path)
    if identity.size_bytes == 0:
        raise DataError(f"The file {shown(str(path))} is empty.")
    with file_bytes.open_bytes(path, identity, lambda _: None) as file:
        file.read(1)
    return identity


def passes(path: Path) -> int:
    """How often `open_file` goes through the bytes of a file."""
    return 2 if kind_of(path) == ".parquet" else 1


def open_file(path: Path, on_read: OnRead = lambda _: None) -> TextFile:
    """Reads a file through; raises as `check_file` does, and `DataError` if its text cannot be read or it has none.

    `on_read` is told of the bytes that are read, now and in later readings; what it raises ends the reading.
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
        have = "row has" if counts.empty_rows == 1 else "rows have"
        notices.append(
            f"{name}: {counts.empty_rows:,} {have} no text and {'was' if counts.empty_rows == 1 else 'were'} skipped."
        )
    if counts.mended_rows:
        have = "row has" if counts.mended_rows == 1 else "rows have"
        notices.append(
            f"{name}: {counts.mended_rows:,} {have} half of a character, a lone surrogate, which is read as U+FFFD."
        )
    return TextFile(path, kind, identity, digest.hexdigest(), np.array(lengths), tuple(notices), on_read)


def _passages(
    path: Path, kind: str, identity: Identity, counts: Counts, on_read: OnRead, on_content: Callable[[bytes], None]
) -> Iterator[Passage]:
    for passage in documents.passages(_pieces(path, kind, identity, counts, on_read, on_content)):
        on_read(0)  # much text can come out of one reading
        yield passage


def _pieces(
    path: Path, kind: str, identity: Identity, counts: Counts, on_read: OnRead, on_content: Callable[[bytes], None]
) -> Iterator[documents.Piece]:
    """What a reader of the kind yields; `on_content` is told the content of text."""
    if kind == ".parquet":
        with file_bytes.open_bytes(path, identity, on_read) as file:
            yield from documents.parquet(file, path, counts)
        return

    def told() -> Iterator[bytes]:
        for chunk in file_bytes.content(path, identity, on_read):
            on_content(chunk)
            yield chunk

    chunks = file_bytes.text(path, told())
    yield from documents.marked(chunks, counts) if kind == ".txt" else documents.json_lines(chunks, path, counts)
