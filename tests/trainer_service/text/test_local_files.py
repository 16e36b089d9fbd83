"""Reading any local file gives its text or a one-sentence error."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from shared.errors import DataError, GptloopError, InvalidArgument, NotFound
from shared.gpt.tokenizer import train_bpe
from tests.trainer_service.text.whole_documents import whole_documents
from trainer_service.text import documents, file_bytes
from trainer_service.text.local_files import TextFile, check_file, open_file

MARKER = "<|endoftext|>"
TEXTS = ["one", "two\nlines", "字 three"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


def packed(name: str, content: bytes) -> bytes:
    match name.lower().rpartition(".")[2]:
        case "gz":
            return gzip.compress(content)
        case "zst":
            return zstd(content)
        case _:
            return content


def rows(values: Iterable[object]) -> str:
    return "".join(json.dumps({"text": value}) + "\n" for value in values)


def parquet(path: Path, values: object, **given: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, **given)
    return path


def read(file: TextFile | Path) -> list[str]:
    file = file if isinstance(file, TextFile) else open_file(file)
    found = whole_documents(file.passages())
    assert [len(each) for each in found] == file.lengths.tolist()
    return found


def error_of(path: Path, error: type[GptloopError] = DataError) -> str:
    with pytest.raises(error) as raised:
        read(path)
    text = str(raised.value)
    assert len(text) <= 300 and text.isprintable() and text.endswith("."), text
    return text


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "a.txt.gz", "a.Txt.GZ", "a.txt.zst", "a.jsonl", "a.jsonl.zst"])
def test_the_ending_of_the_name_decides_how_a_file_is_read(tmp_path: Path, name: str) -> None:
    content = (rows(TEXTS) if "jsonl" in name else MARKER.join(TEXTS)).encode()
    file = open_file(write(tmp_path / name, packed(name, content)))
    assert read(file) == TEXTS
    assert file.digest == open_file(write(tmp_path / f"b.{file.kind}", content)).digest


def test_several_archives_in_one_file_are_one_text(tmp_path: Path) -> None:
    for name, compress in (("a.txt.gz", gzip.compress), ("a.txt.zst", zstd)):
        assert read(write(tmp_path / name, compress(b"one ") + compress(b"text"))) == ["one text"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.txt.zst"])
def test_an_archive_that_is_cut_off_or_damaged_is_rejected(tmp_path: Path, name: str) -> None:
    whole = packed(name, os.urandom(50_000).hex().encode())
    damaged = [*(whole[:-cut] for cut in (1, 4, 20)), whole[:20_000], whole + whole[:9], b"no archive at all"]
    if name.endswith("gz"):  # a zstd archive need not have a checksum
        damaged.append(whole[:20_000] + bytes(5000) + whole[25_000:])
    for content in damaged:
        assert f"{name}' is damaged or cut off" in error_of(write(tmp_path / name, content))


def test_a_highly_compressed_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wb") as archive:
        for _ in range(64):
            archive.write(b"a" * (1 << 20))
    tracemalloc.start()
    try:
        (length,) = open_file(tmp_path / "a.txt.gz").lengths
        assert length == 64 << 20
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "a.csv.gz", "a.parquet.gz", "a.txt.bz2", ".txt"])
def test_other_names_are_rejected(tmp_path: Path, name: str) -> None:
    assert "cannot be read" in error_of(write(tmp_path / name, "text"), InvalidArgument)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("text".encode("utf-16"), "UTF-16 text: convert it"),
        ("text".encode("utf-32"), "UTF-32 text: convert it"),
        ("plain text of some length".encode("utf-16-le"), "UTF-16LE"),
        ("r\xe9sum\xe9".encode("latin-1"), "byte 1 is invalid. If it is Latin-1"),
        (gzip.compress(b"text", mtime=0), "let its name end in .gz"),
        (zstd(b"text"), "let its name end in .zst"),
        (b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\xff", "does not look like text"),
        (b"%PDF-1.7\n\xff\xff", "a PDF document"),
        (b"good text \xff", "byte 10 is invalid"),
        (b"cut off \xe5\xad", "byte 8 is invalid"),
        (b"\xed\xa0\x80", "byte 0 is invalid"),
    ],
)
def test_the_error_for_another_encoding_names_the_probable_one(tmp_path: Path, content: bytes, kind: str) -> None:
    message = error_of(write(tmp_path / "a.txt", content))
    assert "is not UTF-8 text" in message and kind in message


@pytest.mark.parametrize("size_bytes", [1, 2, 3, 1000])
def test_byte_order_marks_line_ends_and_nul_bytes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size_bytes: int
) -> None:
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", size_bytes)
    content = b"\xef\xbb\xbfone\r\ntwo\rthree\n\n\n and a NUL \0 in a long line\n\r\n"
    assert read(write(tmp_path / "a.txt", content)) == ["one\ntwo\nthree\n\n\n and a NUL \0 in a long line"]
    assert read(write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n\n{"text": "two"}\r\n')) == [
        "one",
        "two",
    ]


@pytest.mark.parametrize("content", [" ", "\n\n", MARKER, f" {MARKER} \n{MARKER}", "\ufeff"])
def test_a_file_without_text_is_rejected(tmp_path: Path, content: str) -> None:
    assert error_of(write(tmp_path / "a.txt", content)) == "The file 'a.txt' has no text."


def test_cutting_a_long_document_into_passages_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PART_CHARACTERS", 50)
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", 64)
    tokenizer = train_bpe(["words, words and   more words."] * 9, 280)
    text = "words, words and   more words.\n" * 100 + "字。" * 300 + "x" * 300 + " " * 20 + "end"
    for path in (
        write(tmp_path / "a.txt", f"  {text} {MARKER}second"),
        write(tmp_path / "a.jsonl", rows([f" {text}\n", "second"])),
        parquet(tmp_path / "a.parquet", [text, "second"]),
    ):
        file = open_file(path)
        assert read(file) == [text, "second"]
        passages = [passage.text for passage in file.passages()]
        assert max(map(len, passages)) <= 164
        encoded = [token for passage in passages[:40] for token in tokenizer.encode(passage)]
        assert encoded == tokenizer.encode("".join(passages[:40]))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": 5}', 'has a number in the field "text", but must have a string there'),
        ('{"text": ["' + "a" * 80_000 + '"]}', "has a list in the field"),
        ('{"text": {"a": 1}}', "has an object in the field"),
        ('"text"', "is a string, but must be a JSON object with its text in the field"),
        ("[]", "is a list, but must be a JSON object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply"),
        ('{"text": ' + "9" * 6000 + "}", 'in the field "text", but must have a string there'),
        ('{"text": "a\tb"}', "is not JSON"),
    ],
)
def test_the_error_for_a_wrong_line_gives_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    message = error_of(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n"))
    assert message.startswith("Line 2 of 'a.jsonl' ") and sentence in message


def test_other_fields_are_ignored(tmp_path: Path) -> None:
    line = '{"id": ' + "9" * 6000 + ', "x": NaN, "text": "fine"}\n'
    assert read(write(tmp_path / "a.jsonl", line)) == ["fine"]


def test_a_line_that_is_too_long_is_rejected_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "LINE_CHARACTERS", 1000)
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", 100)
    assert "Line 2 of 'a.jsonl' is longer" in error_of(write(tmp_path / "a.jsonl", rows(["fine", "a" * 100_000])))


def test_rows_without_text_are_skipped_and_counted(tmp_path: Path) -> None:
    values = ["one", None, "", " \n", "two"]
    lines = rows(values) + '{"other": 1}\n'
    for path, count in ((write(tmp_path / "a.jsonl", lines), 4), (parquet(tmp_path / "a.parquet", values), 3)):
        file = open_file(path)
        assert read(file) == ["one", "two"]
        assert file.notices == (f"'{path.name}': skipped {count} rows without text.",)
    (notice,) = open_file(write(tmp_path / "b.jsonl", rows(["one", None]))).notices
    assert notice == "'b.jsonl': skipped 1 row without text."
    assert "The file 'c.jsonl' has no text in" in (
        error_of(write(tmp_path / "c.jsonl", '{"story": "a", "id": 1}\n' + rows([None])))
    )
    assert error_of(parquet(tmp_path / "c.parquet", [None, None])) == "The file 'c.parquet' has no text in \"text\"."


def test_half_a_character_is_replaced_and_counted(tmp_path: Path) -> None:
    content = '{"text": "whole \\ud83d\\ude00"}\n{"text": "half \\ud83d!"}\n'
    file = open_file(write(tmp_path / "a.jsonl", content))
    assert read(file) == ["whole 😀", "half \ufffd!"]
    assert file.notices == ("'a.jsonl': replaced lone surrogates (half characters) with U+FFFD in 1 row.",)


def test_wrong_columns_of_parquet_give_a_short_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    deep = pyarrow.struct([(f"field_{number}", pyarrow.list_(pyarrow.string())) for number in range(5000)])
    kinds = [pyarrow.int64(), pyarrow.binary(), pyarrow.list_(pyarrow.string()), deep]
    for kind in kinds:
        message = error_of(parquet(path, pyarrow.array([None], kind)))
        assert "The column \"text\" of 'a.parquet' holds " in message and "but must hold strings" in message
    pyarrow.parquet.write_table(pyarrow.table({f"column {number}": [1] for number in range(3000)}), path)
    assert 'has no column "text"; its columns are \'column 0' in error_of(path)
    twice = pyarrow.Table.from_arrays([["a"], ["b"]], ["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    assert error_of(path) == "'a.parquet' has 2 columns \"text\", but must have one."
    assert "cannot be read as Parquet" in error_of(write(path, "no parquet"))
    whole = parquet(path, ["text"] * 1000).read_bytes()
    assert "cannot be read as Parquet" in error_of(write(path, whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string())]
)
def test_every_kind_of_text_column_is_read(tmp_path: Path, kind: object) -> None:
    column = pyarrow.array(["one", "one", None, "two"], pyarrow.string()).cast(kind)
    assert read(parquet(tmp_path / "a.parquet", column)) == ["one", "one", "two"]


def test_the_error_for_a_parquet_row_that_is_not_utf8_gives_its_number(tmp_path: Path) -> None:
    values = pyarrow.array([b"fine"] * 1500 + [b"\xff\xfe"] + [b"fine"]).view(pyarrow.string())
    assert error_of(parquet(tmp_path / "a.parquet", values)) == (
        "Row 1,501 of 'a.parquet' is not UTF-8 text. Convert or remove it."
    )


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("how", ["grown", "same size", "replaced", "gone"])
def test_a_file_that_has_changed_cannot_be_read_again(tmp_path: Path, name: str, how: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        parquet(path, ["some text"] * 5)
    else:
        content = rows(["some text"] * 5).encode()
        write(path, gzip.compress(content) if name.endswith("gz") else content)
    file = open_file(path)
    status, content = path.stat(), path.read_bytes()
    if how == "grown":
        with path.open("ab") as appended:
            appended.write(content)
    elif how == "same size":
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "replaced":
        write(tmp_path / "new", content).replace(path)
    else:
        path.unlink()
    with pytest.raises((DataError, NotFound), match=r"changed while it was read|no longer exists"):
        read(file)


def test_a_file_that_changes_during_a_reading_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", 100)
    path = write(tmp_path / "a.txt", "some text " * 1000)
    passed = []

    def change(size_bytes: int) -> None:
        passed.append(size_bytes)
        if len(passed) == 5:
            with path.open("r+b") as file:
                file.write(b"other")

    with pytest.raises(DataError, match=r"'.*a\.txt' changed while it was read"):
        open_file(path, change)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.parquet"])
def test_a_reading_can_be_ended_at_any_chunk(tmp_path: Path, name: str) -> None:
    values = [os.urandom(500).hex()] * 500
    if name == "a.parquet":
        parquet(tmp_path / name, values)
    else:
        content = (rows(values) if "jsonl" in name else "".join(values)).encode()
        write(tmp_path / name, packed(name, content))

    def end(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_file(tmp_path / name, end)
    sizes: list[int] = []
    file = open_file(tmp_path / name, lambda size_bytes: sizes.append(size_bytes) if len(sizes) < 10**6 else end(0))
    assert sum(sizes) >= (tmp_path / name).stat().st_size
    sizes += [0] * 10**6
    with pytest.raises(KeyboardInterrupt):
        read(file)


def test_errors_show_names_printable_and_short(tmp_path: Path) -> None:
    names = ["\x1b[31mred\n.txt", "\udcff.txt", "long" * 50 + ".txt"]
    for name in names:
        assert "has no text" in error_of(write(tmp_path / name, " "))
        assert "is empty" in error_of(write(tmp_path / name, ""))
        (tmp_path / name).unlink()
        assert "does not exist" in error_of(tmp_path / name, NotFound)
    (tmp_path / "\x1b.txt").mkdir()
    assert "is a folder" in error_of(tmp_path / "\x1b.txt", InvalidArgument)


def test_an_unreadable_file_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(os, "open", deny)
    assert "Permission denied" in error_of(path)


def test_a_pipe_that_replaces_a_file_does_not_block(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    file = open_file(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="changed while it was read"):
        read(file)
    with pytest.raises(InvalidArgument, match="is a pipe"):
        check_file(path)


@pytest.mark.skipif("GPTLOOP_TEST_DATA" not in os.environ, reason="GPTLOOP_TEST_DATA is not set")
def test_real_awkward_files_are_read_or_rejected() -> None:
    folder = Path(os.environ["GPTLOOP_TEST_DATA"]) / "awkward"
    assert "Row " in error_of(folder / "invalid-utf8.parquet")
    assert "but must hold strings" in error_of(folder / "list-column.parquet")
    assert "without text" in open_file(folder / "null-rows.parquet").notices[0]
    file = open_file(folder / "lone-surrogate.jsonl")
    assert "lone surrogates" in file.notices[0]
    assert train_bpe(read(file), 300).encode("\ufffd")


def test_checking_files_loads_no_pyarrow(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    code = "import sys, pathlib; from trainer_service.text.local_files import open_file; "
    code += "open_file(pathlib.Path(sys.argv[1])); sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
