"""Text in local files: .txt, .jsonl and .parquet, read as documents in bounded memory."""

import codecs
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from shared.errors import DataError, InvalidArgument, NotFound
from shared.gpt.tokenizer import END_OF_TEXT, safe_cut

ENDINGS = (".txt", ".jsonl", ".parquet")
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Passage:
    """A document, or a part of a long one; cut where this changes no token."""

    text: str
    ends_document: bool = True


@dataclass(frozen=True)
class TextFile:
    """A file that was read once: its SHA-256, and whether it is a .txt file without an end-of-text marker."""

    path: Path
    digest: str
    is_one_document: bool

    def passages(self) -> Iterator[Passage]:
        """The documents in their order, without surrounding white space and without empty ones.

        Raises `DataError` where the file cannot be read as its ending promises.
        """
        if self.is_one_document:
            return _cut(_read_text(self.path))
        read = {".txt": _read_marked, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[self.path.suffix]
        return (Passage(text.strip()) for text in read(self.path) if text.strip())


def check_file(path: Path) -> None:
    """Raises `NotFound`, `InvalidArgument` or `DataError` where a file cannot be read; looks at no text."""
    if path.is_dir():
        raise InvalidArgument(f"{path} is a folder; name the files in it, each ending in {', '.join(ENDINGS)}.")
    if not path.exists():
        raise NotFound(f"The file {path} does not exist.")
    if path.suffix not in ENDINGS:
        raise InvalidArgument(f"The file {path} cannot be read: its name must end in {', '.join(ENDINGS)}.")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError(f"The file {path} is empty.")
    except OSError as error:
        raise DataError(f"The file {path} cannot be read: {error.strerror}.") from None


def open_file(path: Path) -> TextFile:
    """Reads a file through once; raises as `check_file` does, and `DataError` where its text is not UTF-8."""
    check_file(path)
    digest = hashlib.sha256()
    marked, tail = False, ""
    if path.suffix == ".parquet":
        for chunk in _read_bytes(path):
            digest.update(chunk)
    else:
        for text in _read_text(path, digest.update):
            tail = tail[-len(END_OF_TEXT) :] + text
            marked = marked or END_OF_TEXT in tail
    return TextFile(path, digest.hexdigest(), is_one_document=path.suffix == ".txt" and not marked)


def _read_bytes(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise DataError(f"The file {path} cannot be read: {error.strerror}.") from None


def _read_text(path: Path, on_bytes: Callable[[bytes], None] = lambda _: None) -> Iterator[str]:
    """The text of a UTF-8 file in chunks, without a byte order mark, line ends as "\\n"."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position_bytes = 0
    for chunk in chain(_read_bytes(path), [b""]):
        on_bytes(chunk)
        pending_bytes = len(decoder.getstate()[0])
        try:
            text = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
        except UnicodeDecodeError as error:
            at = position_bytes - pending_bytes + error.start
            raise DataError(f"The file {path} is not UTF-8 text: byte {at} cannot be read. Convert it first.") from None
        yield text.removeprefix("\ufeff") if position_bytes == 0 else text
        position_bytes += len(chunk)


def _cut(chunks: Iterator[str]) -> Iterator[Passage]:
    """One document as passages of about a chunk each, of a few where no place is safe to cut."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        cut = safe_cut(rest, 0, len(rest))
        if cut < len(rest) or cut > 4 * CHUNK_BYTES:
            yield Passage(rest[:cut], ends_document=False)
            rest = rest[cut:]
    yield Passage(rest)


def _split(chunks: Iterator[str], separator: str) -> Iterator[str]:
    """What stands before, between and after the separators."""
    rest = ""
    for chunk in chunks:
        *pieces, rest = (rest + chunk).split(separator)
        yield from pieces
    yield rest


def _read_marked(path: Path) -> Iterator[str]:
    return _split(_read_text(path), END_OF_TEXT)


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_split(_read_text(path), "\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise DataError(f'Line {number} of {path} is not a JSON object with its text in the field "text".')
        yield text


def _read_parquet(path: Path) -> Iterator[str]:
    # Loading pyarrow takes about a second, which only those who read .parquet need to wait.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise DataError(f'{path} has no column "text"; its columns are {", ".join(file.schema_arrow.names)}.')
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise DataError(f'The column "text" of {path} holds {text!r}, which is no text.')
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}.") from None
