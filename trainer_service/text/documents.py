"""Reads documents from text with end markers, JSON lines and Parquet.

A reader yields parts of documents, and counts what it finds.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shared.errors import DataError, shown
from shared.gpt.tokenizer import END_OF_TEXT, PART_CHARACTERS, safe_cut

# The longest line of JSON: a line is held in memory whole.
LINE_CHARACTERS = 32 << 20
# The size of a batch of Parquet rows in memory.
_BATCH_BYTES = 8 << 20


class Part(NamedTuple):
    """A part of a document, cut anywhere, and whether the document ends with it."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Passage:
    """A document, or a part of a long one that is cut where the cut changes no token."""

    text: str
    ends_document: bool = True


@dataclass
class Counts:
    """What a reader found: end markers, rows without text, rows with half a character, and the fields of the first row
    without text."""

    markers: int = 0
    empty_rows: int = 0
    mended_rows: int = 0
    fields: list[str] = field(default_factory=list)


def passages(parts: Iterable[Part]) -> Iterator[Passage]:
    """Yields documents, stripped of surrounding white space; long ones as several passages, empty ones not at all.

    White space at the end of a document stays if it is longer than a passage.
    """
    rest, begun = "", False
    for text, ends_document in parts:
        rest = rest + text if begun or rest else text.lstrip()
        start = 0
        while len(rest) - start > 2 * PART_CHARACTERS:
            cut = safe_cut(rest, start, start + PART_CHARACTERS)
            yield Passage(rest[start:cut], ends_document=False)
            start, begun = cut, True
        rest = rest[start:]
        if ends_document:
            rest = rest.rstrip()
            if rest or begun:
                yield Passage(rest)
            rest, begun = "", False


def marked(chunks: Iterable[str], counts: Counts) -> Iterator[Part]:
    """Yields the text before, between and after the end markers."""
    rest = ""
    for chunk in chunks:
        text = rest + chunk
        start = 0
        while (end := text.find(END_OF_TEXT, start)) >= 0:
            counts.markers += 1
            yield Part(text[start:end], ends_document=True)
            start = end + len(END_OF_TEXT)
        # The chunk may end inside a marker.
        kept = max(start, len(text) - len(END_OF_TEXT) + 1)
        yield Part(text[start:kept], ends_document=False)
        rest = text[kept:]
    yield Part(rest, ends_document=True)


def json_lines(chunks: Iterable[str], path: Path, counts: Counts) -> Iterator[Part]:
    """Yields the field `text` of JSON objects, one object a line."""
    for number, row in json_objects(chunks, path, 'its text in the field "text"'):
        text = row.get("text")
        if text is not None and not isinstance(text, str):
            raise DataError(
                f'Line {number:,} of {shown(path.name)} has {_kind(text)} in the field "text", but must have a string '
                "there."
            )
        if text is None and not counts.fields:
            counts.fields = list(row)
        yield from _row(text, counts)


def json_objects(chunks: Iterable[str], path: Path, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the JSON objects of a text, one a line, with the numbers of their lines. Numbers in them are floats.

    Raises `DataError` for a line that is no object; its sentence says that an object needs what is `expected`.
    """
    # No number is used, and Python refuses to parse an int of thousands of digits.
    decode = json.JSONDecoder(parse_int=float).decode
    for number, line in _lines(chunks, path):
        if line.isspace():
            continue
        where = f"Line {number:,} of {shown(path.name)}"
        try:
            row: Any = decode(line)
        except RecursionError:
            raise DataError(f"{where} is nested too deeply.") from None
        except ValueError as error:
            reason = shown(getattr(error, "msg", str(error)), 60)
            raise DataError(f"{where} is not JSON: {reason}. Each line must be an object with {expected}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is {_kind(row)}, but must be a JSON object with {expected}.")
        yield number, row


def _lines(chunks: Iterable[str], path: Path) -> Iterator[tuple[int, str]]:
    """Yields the non-empty lines with their numbers."""
    number, parts, length = 1, list[str](), 0
    for chunk in chunks:
        *ended, rest = chunk.split("\n")
        for end in ended:
            if end or parts:
                yield number, "".join([*parts, end])
                parts, length = [], 0
            number += 1
        if rest:
            parts.append(rest)
            length += len(rest)
        if length > LINE_CHARACTERS:
            raise DataError(
                f"Line {number:,} of {shown(path.name)} is longer than {LINE_CHARACTERS:,} characters; split its text "
                "into several lines, or put it into a .txt file."
            )
    if parts:
        yield number, "".join(parts)


def parquet(file: BinaryIO, path: Path, counts: Counts) -> Iterator[Part]:
    """Yields the texts of the column `text`."""
    # Loading pyarrow takes about a second, so only reading .parquet loads it.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    name = shown(path.name)
    try:
        # Reads column chunks of any size through a small buffer.
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as table:
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise DataError(f'{name} has no column "text"; its columns are {shown(", ".join(columns), 120)}.')
            if columns.count("text") > 1:
                raise DataError(f'{name} has {columns.count("text")} columns "text", but must have one.')
            kind = table.schema_arrow.field("text").type
            if not _holds_text(kind, pyarrow.types):
                raise DataError(f'The column "text" of {name} holds {shown(str(kind), 60)}, but must hold strings.')
            first = 1
            for batch in table.iter_batches(batch_size=_batch_size(table.metadata), columns=["text"]):
                yield from _rows(batch.column(0), first, name, counts)
                first += len(batch)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {shown(str(error), 120)}.") from None


def _holds_text(kind: Any, types: Any) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    checks = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    return any(check(kind) for check in checks)


def _batch_size(metadata: Any) -> int:
    """Returns how many rows take about `_BATCH_BYTES`."""
    size_bytes = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return int(min(max(_BATCH_BYTES * metadata.num_rows // max(size_bytes, 1), 1), 1024))


def _rows(column: Any, first: int, name: str, counts: Counts) -> Iterator[Part]:
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        for number, scalar in enumerate(column, start=first):
            try:
                scalar.as_py()
            except UnicodeDecodeError:
                raise DataError(f"Row {number:,} of {name} is not UTF-8 text. Convert or remove it.") from None
        raise
    for text in texts:
        yield from _row(text, counts)


def _row(text: str | None, counts: Counts) -> Iterator[Part]:
    if text is None or not text.strip():
        counts.empty_rows += 1
        return
    mended = whole(text)
    counts.mended_rows += mended is not text
    yield Part(mended, ends_document=True)


def whole(text: str) -> str:
    """Returns the text with U+FFFD in place of each half of a character (a lone surrogate), which no tokenizer can
    encode."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _kind(value: object) -> str:
    """Returns the kind of a JSON value, in words."""
    names = {list: "a list", dict: "an object", str: "a string", float: "a number", bool: "true or false"}
    return names.get(type(value), "null")
