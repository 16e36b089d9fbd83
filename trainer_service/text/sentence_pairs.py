"""Reads minimal pairs: sentences that differ in little, of which one is right, in the format of BLiMP.

A line is a JSON object with `sentence_good` and `sentence_bad`; other fields are ignored.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DataError, InvalidArgument, shown
from trainer_service.text import file_bytes
from trainer_service.text.documents import json_objects, whole
from trainer_service.text.local_files import check_file, kind_of

# All of BLiMP has 67,000.
MOST_PAIRS = 100_000
_FIELDS = ("sentence_good", "sentence_bad")
_EXPECTED = 'a sentence in each of the fields "sentence_good" and "sentence_bad"'


@dataclass(frozen=True)
class SentencePair:
    """The right sentence, the wrong one, and their line in the file, from 1 on."""

    good: str
    bad: str
    line: int


@dataclass(frozen=True)
class PairsFile:
    """The pairs of a file, and the SHA-256 of its decompressed content."""

    pairs: tuple[SentencePair, ...]
    sha256: str


def read_pairs(path: Path) -> PairsFile:
    """Reads a .jsonl file, which may be compressed.

    Raises `NotFound`, `InvalidArgument` or `DataError` with the file and the line that is wrong.
    """
    identity = check_file(path)
    if kind_of(path) != ".jsonl":
        raise InvalidArgument(
            f"The file {shown(str(path))} cannot be read as minimal pairs: its name must end in .jsonl, .jsonl.gz or "
            ".jsonl.zst."
        )
    digest = hashlib.sha256()

    def content() -> Iterator[bytes]:
        for chunk in file_bytes.content(path, identity, lambda _: None):
            digest.update(chunk)
            yield chunk

    pairs = []
    for number, row in json_objects(file_bytes.text(path, content()), path, _EXPECTED):
        pairs.append(_pair(row, number, f"Line {number:,} of {shown(path.name)}"))
        if len(pairs) > MOST_PAIRS:
            raise DataError(f"The file {shown(path.name)} has more than {MOST_PAIRS:,} pairs; split it.")
    if not pairs:
        raise DataError(f"The file {shown(path.name)} has no pairs; each line must be an object with {_EXPECTED}.")
    return PairsFile(tuple(pairs), digest.hexdigest())


def check_pairs(path: Path) -> None:
    """Raises what `read_pairs` raises."""
    read_pairs(path)


def _pair(row: dict[str, object], line: int, where: str) -> SentencePair:
    sentences = []
    for name in _FIELDS:
        sentence = row.get(name)
        if not isinstance(sentence, str) or not sentence.strip():
            found = f'{shown(sentence)} in "{name}"' if name in row else f'no "{name}"'
            raise DataError(f"{where} has {found}, but must have {_EXPECTED}.")
        sentences.append(whole(sentence))
    good, bad = sentences
    if good == bad:
        raise DataError(f"{where} has {shown(good)} in both fields, but its sentences must differ.")
    return SentencePair(good, bad, line)
