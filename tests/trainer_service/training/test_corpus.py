import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets  # type: ignore[import-untyped]
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError, GptloopError, InvalidArgument, NotFound, Unavailable
from trainer_service.training import local_files
from trainer_service.training.corpus import DatasetSpec, absolute, check_spec, open_corpus
from trainer_service.training.local_files import Passage

MARKER = "<|endoftext|>"


def documents(passages: Iterator[Passage]) -> list[str]:
    found, text = [], ""
    for passage in passages:
        text += passage.text
        if passage.ends_document:
            found.append(text)
            text = ""
    assert not text
    return found


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def spec(*names: str, validation: tuple[str, ...] = ()) -> DatasetSpec:
    return DatasetSpec(names, validation)


def read(path: Path) -> list[str]:
    return documents(local_files.open_file(path).passages())


def test_builtin_has_two_splits_that_begin_anew() -> None:
    corpus = open_corpus(spec("builtin"), 0.05)
    assert len(list(corpus.train())) == 12_000
    assert len(list(corpus.validation())) == 600
    assert next(corpus.train()) == next(corpus.train())
    assert corpus.source == "builtin"


def test_marked_text_is_parted_and_a_cut_last_document_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write(path, f"one\n{MARKER}\ntwo {MARKER}\n\n{MARKER}three is cu")
    assert read(path) == ["one", "two", "three is cu"]
    assert not open_corpus(spec(str(path), validation=(write(tmp_path / "v.txt", f"x{MARKER}"),)), 0.05).notices


def test_a_marker_across_chunks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write(path, f"äöü{MARKER}second{MARKER}third\r\nline")
    for size_bytes in range(1, 20):
        monkeypatch.setattr(local_files, "CHUNK_BYTES", size_bytes)
        assert read(path) == ["äöü", "second", "third\nline"]


def test_text_without_a_marker_is_one_document_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "CHUNK_BYTES", 64)
    text = "".join(f"Sentence {number} is here.\n" for number in range(200))
    corpus = open_corpus(spec(write(tmp_path / "a.txt", text)), 0.1)
    (train,), (validation,) = documents(corpus.train()), documents(corpus.validation())
    assert train + validation == text
    assert len(validation) == pytest.approx(len(text) / 10, abs=30)
    assert "no <|endoftext|> marker" in corpus.notices[0]
    assert "last 10.0%" in corpus.notices[1]
    assert len(list(corpus.train())) > 10


def test_text_without_spaces_is_read_in_bounded_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "CHUNK_BYTES", 16)
    path = tmp_path / "a.txt"
    write(path, "字" * 2000)
    passages = list(local_files.open_file(path).passages())
    assert max(len(passage.text) for passage in passages) < 100
    assert documents(iter(passages)) == ["字" * 2000]


@given(count=st.integers(1, 70), share=st.floats(0.01, 0.9))
def test_the_splits_share_nothing_and_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, count: int, share: float
) -> None:
    texts = [f"document {number} has some words of its own" for number in range(count)]
    path = tmp_path_factory.mktemp("data") / "a.txt"
    corpus = open_corpus(spec(write(path, MARKER.join(texts))), share)
    train, validation = documents(corpus.train()), documents(corpus.validation())
    if count >= math.ceil(1 / share):
        assert validation
        assert sorted(train + validation) == sorted(texts)
        assert abs(len(validation) - share * count) < 1
    else:
        assert [start + end for start, end in zip(train, validation, strict=True)] == texts


def test_documents_are_held_out_evenly(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(100)]
    corpus = open_corpus(spec(write(tmp_path / "a.txt", MARKER.join(texts))), 0.05)
    assert documents(corpus.validation()) == [texts[index] for index in (19, 39, 59, 79, 99)]
    assert corpus.notices == ("5.0% of the documents, evenly spread, are held out for validation.",)


def test_validation_files_are_held_out_whole(tmp_path: Path) -> None:
    train, validation = write(tmp_path / "a.txt", f"a{MARKER}b"), write(tmp_path / "v.jsonl", '{"text": "c"}\n')
    corpus = open_corpus(spec(train, validation=(validation,)), 0.5)
    assert (documents(corpus.train()), documents(corpus.validation())) == (["a", "b"], ["c"])
    builtin = open_corpus(spec("builtin", validation=(validation,)), 0.5)
    assert documents(builtin.validation()) == ["c"]


def test_files_of_several_kinds_are_read_in_order(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", '{"text": " one "}\n\n{"text": ""}\n{"text": "two\\nlines", "more": 1}')
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["three", "four"]}), tmp_path / "b.parquet")
    txt = write(tmp_path / "c.txt", b"\xef\xbb\xbffive" + MARKER.encode())
    corpus = open_corpus(
        spec(jsonl, str(tmp_path / "b.parquet"), txt, validation=(write(tmp_path / "v.txt", "v"),)), 0.5
    )
    assert documents(corpus.train()) == ["one", "two\nlines", "three", "four", "five"]
    assert corpus.source == "a.jsonl, b.parquet, c.txt"


@pytest.mark.parametrize("line", ['{"txt": "a"}', '{"text": 5}', '"text"', "{", "[]"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    write(path, '{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"Line 2 of .*a\.jsonl"):
        read(path)


def test_wrong_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write(path, "no parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"story": ["a"]}), path)
    with pytest.raises(DataError, match='no column "text"; its columns are story'):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    with pytest.raises(DataError, match="holds 1, which is no text"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("size_bytes", [1, 2, 5, 1000])
def test_text_that_is_not_utf8_is_refused_with_its_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size_bytes: int
) -> None:
    monkeypatch.setattr(local_files, "CHUNK_BYTES", size_bytes)
    with pytest.raises(DataError, match="not UTF-8 text: byte 7 "):
        open_corpus(spec(write(tmp_path / name, b"ab\xc3\xa4cde\xff\xff rest")), 0.5)
    with pytest.raises(DataError, match="byte 2 "):
        open_corpus(spec(write(tmp_path / name, b"ab\xc3")), 0.5)


def test_the_revision_follows_content_and_split(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", f"a{MARKER}b"), write(tmp_path / "b.txt", f"a{MARKER}b")
    revisions = [open_corpus(spec(a), 0.5).revision, open_corpus(spec(a), 0.4).revision]
    revisions.append(open_corpus(spec(a, validation=(b,)), 0.5).revision)
    assert open_corpus(spec(b), 0.5).revision == revisions[0]
    write(tmp_path / "a.txt", f"a{MARKER}c")
    revisions.append(open_corpus(spec(a), 0.5).revision)
    revisions.append(open_corpus(spec("builtin"), 0.5).revision)
    assert len(set(revisions)) == 5


def test_names_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    text, empty = write(tmp_path / "a.txt", "text"), write(tmp_path / "empty.txt", "")
    cases: list[tuple[DatasetSpec, type[GptloopError], str]] = [
        (spec(), InvalidArgument, "No data set is named"),
        (
            spec("tinystorys"),
            InvalidArgument,
            "Unknown data set 'tinystorys'. It can be builtin",
        ),
        (spec("builtin", text), InvalidArgument, "builtin stands alone"),
        (spec(str(tmp_path / "absent.txt")), NotFound, "does not exist"),
        (spec(str(tmp_path)), InvalidArgument, "is a folder"),
        (spec(empty), DataError, "is empty"),
        (spec(write(tmp_path / "a.csv", "text")), InvalidArgument, "must end in .txt, .jsonl, .parquet"),
        (spec(text, text), InvalidArgument, "named twice"),
        (spec(text, validation=(text,)), InvalidArgument, "named twice"),
        (spec("builtin", validation=("builtin",)), NotFound, "does not exist"),
    ]
    for wrong, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            check_spec(wrong)


def test_an_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", "text")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        check_spec(spec(path))


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = absolute(spec("a.txt", validation=("v.txt",)))
    assert made == spec(str(tmp_path / "a.txt"), validation=(str(tmp_path / "v.txt"),))
    assert absolute(spec("wikitext-103")) == spec("wikitext-103")


class FakeBuilder:
    """What `datasets.load_dataset_builder` returns, as far as it is used here."""

    hash = "c0ffee"

    def __init__(self, rows: dict[str, list[str]]) -> None:
        self.rows = rows

    def as_streaming_dataset(self, split: str) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in self.rows[split])


def test_a_hub_data_set_has_its_own_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(repository: str, configuration: str | None) -> FakeBuilder:
        asked.append((repository, configuration))
        return FakeBuilder({"train": ["one ", "", "two"], "validation": ["three"]})

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(spec("roneneldan/TinyStories"), 0.05)
    assert asked == [("roneneldan/TinyStories", None)]
    assert (documents(corpus.train()), documents(corpus.validation())) == (["one", "two"], ["three"])
    assert not corpus.notices


def test_wikitext_is_read_as_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = First = \n", " Text . \n", " = = Part = = \n", " More . \n", " = Second = \n", " End . \n"]
    asked = []

    def load(repository: str, configuration: str | None) -> FakeBuilder:
        asked.append((repository, configuration))
        return FakeBuilder({"train": lines, "validation": []})

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(spec("wikitext-103"), 0.05)
    assert asked == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert documents(corpus.train()) == ["= First = \n Text . \n = = Part = = \n More .", "= Second = \n End ."]
    assert corpus.source == "Salesforce/wikitext wikitext-103-raw-v1"


def test_a_hub_that_cannot_be_reached_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(Unavailable, match=r"cannot be downloaded: no network\. .* use builtin or a local file"):
        open_corpus(spec("roneneldan/TinyStories"), 0.05)
    broken = SimpleNamespace(hash="c0ffee", as_streaming_dataset=fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: broken)
    with pytest.raises(Unavailable, match="cannot be downloaded: no network"):
        next(open_corpus(spec("roneneldan/TinyStories"), 0.05).train())


def test_the_real_library_reads_a_hub_folder_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"a story to {split}"}) + "\n")
    real = datasets.load_dataset_builder

    def load(repository: str, configuration: str | None) -> object:
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
        return real("json", configuration, data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(spec("roneneldan/TinyStories"), 0.05)
    assert (documents(corpus.train()), documents(corpus.validation())) == (
        ["a story to train"],
        ["a story to validation"],
    )
