import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from shared.errors import DataError, GptloopError, InvalidArgument, NotFound
from tests.trainer_service.text.whole_documents import whole_documents
from trainer_service.text import file_bytes, local_files
from trainer_service.text.corpus import DatasetSpec, absolute, check_size, check_spec, open_corpus

MARKER = "<|endoftext|>"


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def spec(*names: str, validation: tuple[str, ...] = ()) -> DatasetSpec:
    return DatasetSpec(names, validation)


def read(path: Path) -> list[str]:
    return whole_documents(local_files.open_file(path).passages())


def test_each_call_reads_a_builtin_split_from_its_start() -> None:
    corpus = open_corpus(spec("builtin"), 0.05)
    assert len(list(corpus.train())) == 12_000
    assert len(list(corpus.validation())) == 600
    assert next(corpus.train()) == next(corpus.train())
    assert corpus.source == "builtin"


def test_markers_separate_documents_and_an_unfinished_last_document_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, f"one\n{MARKER}\ntwo {MARKER}\n\n{MARKER}three is cu")
    assert read(path) == ["one", "two", "three is cu"]
    assert not open_corpus(spec(str(path), validation=(write(tmp_path / "v.txt", f"x{MARKER}"),)), 0.05).notices


def test_a_marker_across_chunks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write(path, f"äöü{MARKER}second{MARKER}third\r\nline")
    for size_bytes in range(1, 20):
        monkeypatch.setattr(file_bytes, "CHUNK_BYTES", size_bytes)
        assert read(path) == ["äöü", "second", "third\nline"]


def test_validation_files_are_held_out_whole(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "a.txt", f"a{MARKER}b"), write(tmp_path / "v.jsonl", '{"text": "c"}\n')
    corpus = open_corpus(spec(train, validation=(validation,)), 0.5)
    assert (whole_documents(corpus.train()), whole_documents(corpus.validation())) == (["a", "b"], ["c"])
    builtin = open_corpus(spec("builtin", validation=(validation,)), 0.5)
    assert whole_documents(builtin.validation()) == ["c"]


def test_files_of_several_kinds_are_read_in_order(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", '{"text": " one "}\n\n{"text": ""}\n{"text": "two\\nlines", "more": 1}')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["three", "four"]}), tmp_path / "b.parquet")
    txt = write(tmp_path / "c.txt", b"\xef\xbb\xbffive" + MARKER.encode())
    corpus = open_corpus(
        spec(jsonl, str(tmp_path / "b.parquet"), txt, validation=(write(tmp_path / "v.txt", "v"),)), 0.5
    )
    assert whole_documents(corpus.train()) == ["one", "two\nlines", "three", "four", "five"]
    assert corpus.source == "a.jsonl, b.parquet, c.txt"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("size_bytes", [1, 2, 5, 1000])
def test_the_error_for_text_that_is_not_utf8_gives_the_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size_bytes: int
) -> None:
    monkeypatch.setattr(file_bytes, "CHUNK_BYTES", size_bytes)
    with pytest.raises(DataError, match="not UTF-8 text: byte 7 "):
        open_corpus(spec(write(tmp_path / name, b"ab\xc3\xa4cde\xff\xff rest")), 0.5)
    with pytest.raises(DataError, match="byte 2 "):
        open_corpus(spec(write(tmp_path / name, b"ab\xc3")), 0.5)


def test_the_revision_depends_on_content_and_split(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", f"a{MARKER}b"), write(tmp_path / "b.txt", f"a{MARKER}b")
    revisions = [open_corpus(spec(a), 0.5).revision, open_corpus(spec(a), 0.4).revision]
    revisions.append(open_corpus(spec(a, validation=(b,)), 0.5).revision)
    assert open_corpus(spec(b), 0.5).revision == revisions[0]
    write(tmp_path / "a.txt", f"a{MARKER}c")
    revisions.append(open_corpus(spec(a), 0.5).revision)
    revisions.append(open_corpus(spec("builtin"), 0.5).revision)
    assert len(set(revisions)) == 5


def test_unusable_names_are_rejected(tmp_path: Path) -> None:
    text, empty = write(tmp_path / "a.txt", "text"), write(tmp_path / "empty.txt", "")
    link, other = str(tmp_path / "link.txt"), write(tmp_path / "other.txt", "other")
    (tmp_path / "link.txt").hardlink_to(text)
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    cases: list[tuple[DatasetSpec, type[GptloopError], str]] = [
        (spec(), InvalidArgument, "No data set is given"),
        (spec("tinystorys"), InvalidArgument, "Unknown data set 'tinystorys'. Use builtin"),
        (spec("builtin", text), InvalidArgument, "builtin cannot be combined with other data"),
        (spec(str(tmp_path / "absent.txt")), NotFound, "does not exist"),
        (spec(str(tmp_path)), InvalidArgument, "is a folder"),
        (spec(empty), DataError, "is empty"),
        (spec(write(tmp_path / "a.csv", "text")), InvalidArgument, "must end in .txt, .jsonl, .parquet"),
        (spec(text, text), InvalidArgument, "named twice"),
        (spec(text, link, other), InvalidArgument, "named twice"),
        (spec(text, other, str(tmp_path / "loop.txt")), DataError, "symbolic links"),
        (spec("a\0.txt"), InvalidArgument, r"'a\\x00\.txt' is not a valid file name"),
        (spec(text + "/b.txt"), DataError, "Not a directory"),
        (spec("a" * 300 + ".txt"), DataError, "too long"),
        (spec("a" * 300), InvalidArgument, "Unknown data set 'aaa"),
        (spec(text, validation=(text,)), InvalidArgument, "named twice"),
        (spec("builtin", validation=("builtin",)), NotFound, "does not exist"),
    ]
    for wrong, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            check_spec(wrong)


def bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path)


@pytest.mark.parametrize("make", [os.mkfifo, bind])
def test_a_pipe_a_socket_or_a_device_is_rejected_without_opening_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], None]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    make("a.txt")
    for wrong in (spec("a.txt"), spec("builtin", validation=("a.txt",))):
        with pytest.raises(InvalidArgument, match=r"'a\.txt' is a (pipe|socket), but must be a regular file"):
            check_spec(wrong)
    with pytest.raises(InvalidArgument, match="'/dev/zero' is a device"):
        check_spec(spec("/dev/zero"))


def test_files_too_small_for_two_windows_are_rejected_by_their_size(tmp_path: Path) -> None:
    small, large = write(tmp_path / "s.txt", "字" * 11), write(tmp_path / "l.txt", "a" * 500)
    with pytest.raises(DataError, match=r"text holds 33 bytes, but training and held-out text .* need at least 36"):
        check_size(spec(small), 17)
    check_size(spec(small), 16)
    check_size(spec(small, validation=(large,)), 32)
    with pytest.raises(DataError, match=r"held-out text holds 33 bytes, but one window .* needs at least 101"):
        check_size(spec(large, validation=(small,)), 100)
    check_size(spec("builtin"), 10**6)
    check_size(spec(write(tmp_path / "s.txt.gz", "tiny")), 100)


def test_absolute_changes_paths_and_keeps_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = absolute(spec("a.txt", validation=("v.txt",)))
    assert made == spec(str(tmp_path / "a.txt"), validation=(str(tmp_path / "v.txt"),))
    assert absolute(spec("wikitext-103")) == spec("wikitext-103")
