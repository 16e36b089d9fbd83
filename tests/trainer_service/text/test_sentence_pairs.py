"""Files of minimal pairs: each pair is read, and a bad file is named with its line."""

import gzip
import hashlib
from pathlib import Path

import pytest

from shared.errors import DataError, GptloopError, InvalidArgument, NotFound
from trainer_service.text import sentence_pairs
from trainer_service.text.sentence_pairs import SentencePair, check_pairs, read_pairs

# The first pair of BLiMP's file `adjunct_island`, shortened.
LINE = (
    '{"sentence_good": "Who should Derek hug after shocking Richard?", '
    '"sentence_bad": "Who should Derek hug Richard after shocking?", "field": "syntax", "simple_LM_method": true, '
    '"UID": "adjunct_island", "pairID": "0"}\n'
)
PAIR = ("Who should Derek hug after shocking Richard?", "Who should Derek hug Richard after shocking?")


def test_pairs_are_read_with_their_lines_and_the_hash_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE + "\n" + LINE)
    file = read_pairs(path)
    assert file.pairs == (SentencePair(*PAIR, 1), SentencePair(*PAIR, 3))
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_compressed_file_equals_its_content(tmp_path: Path) -> None:
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_text(LINE)
    packed.write_bytes(gzip.compress(LINE.encode()))
    assert read_pairs(packed) == read_pairs(plain)


def test_half_a_character_becomes_a_replacement_character(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence_good": "a\\ud800", "sentence_bad": "b"}\n')
    assert read_pairs(path).pairs[0].good == "a\ufffd"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "[1]",
            "is a list, but must be a JSON object with a sentence in each of the fields "
            '"sentence_good" and "sentence_bad".',
        ),
        (
            "{",
            "is not JSON: 'Expecting property name enclosed in double quotes'. Each line must be an object with a "
            'sentence in each of the fields "sentence_good" and "sentence_bad".',
        ),
        (
            '{"sentence_good": "a"}',
            'has no "sentence_bad", but must have a sentence in each of the fields "sentence_good" and "sentence_bad".',
        ),
        (
            '{"sentence_good": " ", "sentence_bad": "b"}',
            'has \' \' in "sentence_good", but must have a sentence in each of the fields "sentence_good" and '
            '"sentence_bad".',
        ),
        (
            '{"sentence_good": 5, "sentence_bad": "b"}',
            'has 5.0 in "sentence_good", but must have a sentence in each of the fields "sentence_good" and '
            '"sentence_bad".',
        ),
        (
            '{"sentence_good": "a", "sentence_bad": "a"}',
            "has 'a' in both fields, but its sentences must differ.",
        ),
    ],
)
def test_a_bad_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE + line + "\n")
    for function in (read_pairs, check_pairs):
        with pytest.raises(DataError) as error:
            function(path)
        assert str(error.value) == f"Line 2 of 'pairs.jsonl' {sentence}"


@pytest.mark.parametrize(
    ("name", "content", "kind", "sentence"),
    [
        ("missing.jsonl", None, NotFound, "does not exist"),
        ("empty.jsonl", b"", DataError, "is empty"),
        ("blank.jsonl", b"\n \n", DataError, "has no pairs"),
        ("pairs.txt", b"a\n", InvalidArgument, r"must end in \.jsonl, \.jsonl\.gz or \.jsonl\.zst"),
        ("binary.jsonl", b"\xff\xfe", DataError, "is not UTF-8 text"),
        ("cut.jsonl.gz", gzip.compress(LINE.encode() * 9)[:-9], DataError, "is damaged or cut off"),
    ],
)
def test_a_bad_file_is_a_sentence(
    name: str, content: bytes | None, kind: type[GptloopError], sentence: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=sentence):
        read_pairs(tmp_path / name)


def test_too_many_pairs_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_pairs, "MOST_PAIRS", 2)
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE * 2)
    assert len(read_pairs(path).pairs) == 2
    path.write_text(LINE * 3)
    with pytest.raises(DataError, match="has more than 2 pairs"):
        read_pairs(path)
