"""Machines share prepared tokens through a real bucket; each has a folder of data of its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shared.registry.bucket import Bucket
from tests.object_storage.proxy import Fault, FaultyProxy
from tests.object_storage.server import MISSING, ObjectServer, Place, is_installed
from trainer_service.presets import find_preset
from trainer_service.text import shared_tokens as shared_tokens_module
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.shared_tokens import SharedTokens
from trainer_service.text.tokens import PreparedData, Stage, prepare

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason=MISSING)]

CONFIG = find_preset("demo").override(
    {
        "vocabulary_size": "300",
        "context_length": "16",
        "max_steps": "20",
        "warmup_steps": "1",
        "batch_size": "2",
        "evaluation_windows": "4",
    }
)


class Machine:
    """A machine with its own folder of data, and what it did for the last data that it prepared."""

    def __init__(self, data: Path, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in place.settings.items():
            monkeypatch.setenv(name, value)
        self.data = data
        self.bucket = Bucket(place.url)
        self.shared = SharedTokens(self.bucket)
        self.stages: list[Stage] = []

    def prepare(self, text: Path, **values: str) -> PreparedData:
        self.stages = []
        config = CONFIG.override(values)
        spec = DatasetSpec((str(text),))
        return prepare(spec, config, self.data, lambda stage, _: self.stages.append(stage), shared=self.shared)

    def did(self, stage: Stage) -> bool:
        return stage in self.stages

    def file(self, name: str) -> Path:
        (path,) = self.data.glob(f"**/{name}")
        return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "tales.txt"
    path.write_text("<|endoftext|>".join(f"Tale {n} of the {n * n} foxes." for n in range(800)))
    return path


@pytest.fixture
def machines(object_server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Machine, Machine]:
    place = object_server.place()
    return Machine(tmp_path / "one", place, monkeypatch), Machine(tmp_path / "other", place, monkeypatch)


def test_what_one_machine_has_prepared_another_fetches(machines: tuple[Machine, Machine], text: Path) -> None:
    one, other = machines
    first = one.prepare(text)
    assert one.did(Stage.TOKENIZER) and one.did(Stage.TRAIN) and one.did(Stage.SHARE)
    second = other.prepare(text)
    assert not any(map(other.did, (Stage.TOKENIZER, Stage.TRAIN, Stage.VALIDATION, Stage.SHARE)))
    assert first.tokenizer.digest == second.tokenizer.digest
    assert np.array_equal(first.train, second.train) and np.array_equal(first.validation, second.validation)
    # What is there already is neither looked for nor shared again.
    one.prepare(text)
    assert not one.did(Stage.FETCH) and not one.did(Stage.SHARE)


def test_a_run_that_reads_more_prepares_more_and_shares_that_too(machines: tuple[Machine, Machine], text: Path) -> None:
    one, other = machines
    one.prepare(text, max_train_tokens="500")
    more = other.prepare(text, max_train_tokens="900")
    assert other.did(Stage.TRAIN) and not other.did(Stage.TOKENIZER)
    assert np.array_equal(one.prepare(text, max_train_tokens="900").train, more.train)
    assert not one.did(Stage.TRAIN)


def test_a_machine_that_is_second_uses_what_the_first_one_has_shared(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    """Both prepare at once, and do not get the same bytes."""
    one, other = machines
    paths = tmp_path / "mine", tmp_path / "theirs"
    for path in paths:
        path.write_text(path.name)
    one.shared.offer("key", "name", paths[0])
    other.shared.offer("key", "name", paths[1])
    assert paths[1].read_text() == "mine"
    assert other.shared.names("key") == ["name"]


@pytest.mark.parametrize("change", [lambda content: content[:-1] + bytes([content[-1] ^ 1]), lambda content: b""])
def test_a_file_that_was_changed_in_the_bucket_is_prepared_instead(
    machines: tuple[Machine, Machine], text: Path, change: Callable[[bytes], bytes]
) -> None:
    one, other = machines
    first = one.prepare(text)
    for entry in one.bucket.list("prepared-files"):
        one.bucket.upload(entry.name, change(one.bucket.read(entry.name)[0]))
    assert np.array_equal(other.prepare(text).train, first.train)
    assert other.did(Stage.TRAIN)
    assert list(other.data.glob("**/*.partial")) == []


def test_a_note_that_nobody_understands_is_no_file(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    one, _ = machines
    for note in (b"", b"[]", b'{"sha256": "../x", "size_bytes": 1}', b'{"sha256": 5, "size_bytes": "x"}'):
        one.bucket.upload("prepared/key/name", note)
        assert not one.shared.fetch("key", "name", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_bucket_that_fails_costs_time_and_not_the_job(
    object_server: ObjectServer,
    object_proxy: FaultyProxy,
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("shared.registry.bucket._RETRY_S", 0.2)
    machine = Machine(tmp_path / "one", object_server.place().behind(object_proxy.endpoint), monkeypatch)
    object_proxy.inject(Fault.ERROR_503, times=None)
    assert machine.prepare(text).train.size
    assert "Prepared tokens are not looked for: " in caplog.text
    assert "Prepared tokens are not shared: " in caplog.text


def test_what_was_shared_a_month_ago_is_removed(
    machines: tuple[Machine, Machine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = machines
    path = tmp_path / "file"
    path.write_text("old")
    one.shared.offer("old", "name", path)
    monkeypatch.setattr(shared_tokens_module, "UNUSED_S", -3600.0)
    path.write_text("new")
    one.shared.offer("new", "name", path)
    assert one.bucket.list("prepared") == [] and one.bucket.list("prepared-files") == []
