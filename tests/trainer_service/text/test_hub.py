import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets  # type: ignore[import-untyped]
import huggingface_hub
import pytest

from shared.errors import Unavailable
from trainer_service.text import hub
from trainer_service.text.corpus import DatasetSpec, open_corpus
from trainer_service.text.documents import Passage

STORIES = DatasetSpec(("roneneldan/TinyStories",))


@pytest.fixture(autouse=True)
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)


def texts(passages: Iterator[Passage]) -> list[str]:
    return [passage.text for passage in passages]


class FakeBuilder:
    """The part that is used here of what `datasets.load_dataset_builder` returns."""

    hash = "c0ffee"

    def __init__(self, rows: dict[str, list[str]]) -> None:
        self.rows = rows

    def as_streaming_dataset(self, split: str) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in self.rows[split])


def test_a_hub_data_set_uses_its_own_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(repository: str, configuration: str | None) -> FakeBuilder:
        loaded.append((repository, configuration))
        return FakeBuilder({"train": ["one ", "", "two"], "validation": ["three"]})

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(STORIES, 0.05)
    assert loaded == [("roneneldan/TinyStories", None)]
    assert (texts(corpus.train()), texts(corpus.validation())) == (["one", "two"], ["three"])
    assert not corpus.notices


def test_wikitext_is_read_as_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = First = \n", " Text . \n", " = = Part = = \n", " More . \n", " = Second = \n", " End . \n"]
    loaded = []

    def load(repository: str, configuration: str | None) -> FakeBuilder:
        loaded.append((repository, configuration))
        return FakeBuilder({"train": lines, "validation": []})

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(DatasetSpec(("wikitext-103",)), 0.05)
    assert loaded == [("Salesforce/wikitext", "wikitext-103-raw-v1")]
    assert texts(corpus.train()) == ["= First = \n Text . \n = = Part = = \n More .", "= Second = \n End ."]
    assert corpus.source == "Salesforce/wikitext wikitext-103-raw-v1"


def test_an_unreachable_hub_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> SimpleNamespace:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(Unavailable, match=r"cannot be downloaded: no network\. .* use builtin or a local file"):
        open_corpus(STORIES, 0.05)
    broken = SimpleNamespace(hash="c0ffee", as_streaming_dataset=fail)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: broken)
    with pytest.raises(Unavailable, match="cannot be downloaded: no network"):
        next(open_corpus(STORIES, 0.05).train())


def test_the_real_library_gives_the_same_as_the_fake_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": f"a story to {split}"}) + "\n")
    real = datasets.load_dataset_builder

    def load(repository: str, configuration: str | None) -> object:
        files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
        return real("json", configuration, data_files=files, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    corpus = open_corpus(STORIES, 0.05)
    assert (texts(corpus.train()), texts(corpus.validation())) == (
        ["a story to train"],
        ["a story to validation"],
    )


def test_a_long_error_of_the_hub_becomes_a_short_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("Max retries\n\x1b[31m" + "exceeded with url " * 500)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(Unavailable, match="cannot be downloaded: Max retries") as raised:
        open_corpus(STORIES, 0.05)
    assert len(str(raised.value)) <= 300 and str(raised.value).isprintable()


def test_a_wait_for_the_hub_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer, requested = threading.Event(), threading.Event()

    def wait(*_: object, **__: object) -> None:
        requested.set()
        answer.wait()

    def tick(*_: int) -> None:
        if requested.is_set():
            raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", wait)
    with pytest.raises(KeyboardInterrupt):
        open_corpus(STORIES, 0.05, tick)
    answer.set()


def test_a_silent_hub_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(hub, "SILENCE_S", 0.0)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: answer.wait())
    with pytest.raises(Unavailable, match="cannot be downloaded: No data arrived for 0 s"):
        open_corpus(STORIES, 0.05)
    answer.set()


def test_rows_of_the_hub_without_text_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": "half \ud83d"}]
    builder = SimpleNamespace(hash="c0ffee", as_streaming_dataset=lambda split: rows)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder)
    assert texts(open_corpus(STORIES, 0.05).train()) == ["one", "half \ufffd"]
