"""Runs and evaluations from their jobs on, without queue or worker: a tiny model on a text file."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import pytest

from shared.device.accelerator import Accelerator
from shared.errors import DataError, FailedPrecondition, NotFound, RunOwnershipLost, TrainingDiverged
from shared.gpt.tokenizer import Tokenizer
from shared.registry.decisions import BestBy
from shared.registry.retention import Retention
from shared.registry.store import Checkpoint, Registry
from shared.service.settings import Directories
from tests.fakes import publish_overflowing_version
from tests.records import write_record
from trainer_service.evaluation.job import evaluate_version
from trainer_service.jobs.attempt import Attempt, Stopped
from trainer_service.jobs.events import Evaluation, Event, Notice, Progress, VersionPublished
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec, TrainSpec
from trainer_service.run import TrainingRun
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow

Told = TypeVar("Told", bound=Event)

DEVICE = Accelerator("cpu", "cpu", "", blas=None, memory_bytes=0, cache=Path())
TINY = {
    "vocabulary_size": "300",
    "layers": "1",
    "width": "16",
    "heads": "2",
    "hidden_width": "32",
    "context_length": "16",
    "batch_size": "2",
    "max_steps": "9",
    "warmup_steps": "1",
    "evaluation_interval": "3",
    "evaluation_windows": "4",
}


class Site:
    """A folder with a registry and text, the events that were emitted, and jobs."""

    def __init__(self, folder: Path) -> None:
        self.directories = Directories(folder / "var")
        self.registry = Registry(self.directories.registry)
        self.text = self.write(folder / "text.txt", 0)
        self.other_text = self.write(folder / "other.txt", 1000)
        self.told: list[Event] = []

    @staticmethod
    def write(path: Path, first: int) -> str:
        path.write_text("<|endoftext|>".join(f"Tale {n} of the {n * n} foxes." for n in range(first, first + 400)))
        return str(path)

    def spec(self, resume: int | None = None, dataset: str = "", **values: str) -> TrainSpec:
        text = dataset or (self.text if resume is None else "")
        overrides = values if resume is not None else TINY | values
        request = TrainRequest(dataset=(text,) if text else (), resume=resume, overrides=overrides)
        return request.resolve(self.registry)

    def attempt(
        self, stop_requested: Callable[[], bool] = lambda: False, retention: Retention | None = None
    ) -> Attempt:
        return Attempt(1, self.directories, retention or Retention(), DEVICE, self.told.append, stop_requested)

    def train(self, spec: TrainSpec, **given: object) -> bool:
        return TrainingRun(spec, self.attempt(**given)).train()  # type: ignore[arg-type]

    def all_told(self, kind: type[Told]) -> list[Told]:
        return [event for event in self.told if isinstance(event, kind)]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", refuse)
        yield


def test_a_stop_while_the_data_are_prepared_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        site.train(TrainRequest().resolve(site.registry), stop_requested=lambda: next(asked))
    assert len(site.told) == 2
    assert not list(site.directories.data.rglob("*.bin")) and not site.directories.registry.exists()


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint_and_not_the_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = site.spec()
    with full_disk(monkeypatch):

        def stop_at(step: int) -> bool:
            return any(event.step >= step for event in site.all_told(Progress))

        assert not site.train(spec, stop_requested=lambda: stop_at(6))
    lost, left = (event.text for event in site.all_told(Notice) if "cannot be written" in event.text)
    assert str(site.directories.registry) in lost and lost.endswith("Training continues without this checkpoint.")
    assert left.endswith("The run resumes from an older state.")
    assert site.registry.versions() == [] and site.registry.states(spec.run) == []
    assert site.train(spec)
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]


def test_the_last_checkpoint_must_be_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(monkeypatch), pytest.raises(FailedPrecondition, match="cannot be written"):
        site.train(site.spec(max_steps="3"))


@contextmanager
def refusing(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise FailedPrecondition("The registry cannot be written.")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, name, refuse)
        yield


def test_a_version_is_published_only_once_its_state_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with refusing(monkeypatch, "write_state"), pytest.raises(FailedPrecondition):
        site.train(site.spec(max_steps="3"))
    assert site.registry.versions() == []


def test_pruning_makes_room_for_the_last_checkpoint(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    save, removed = mx.save_safetensors, list[Checkpoint]()

    def save_if_there_is_room(*arguments: object, **named: object) -> None:
        if not removed:
            raise RuntimeError("[write] Unable to write 100 bytes to file.")
        save(*arguments, **named)  # type: ignore[arg-type]

    site.train(site.spec(evaluation_interval="1"))
    monkeypatch.setattr(mx, "save_safetensors", save_if_there_is_room)
    remove = Registry.remove

    def note_and_remove(registry: Registry, checkpoint: Checkpoint) -> None:
        removed.append(checkpoint)
        remove(registry, checkpoint)

    monkeypatch.setattr(Registry, "remove", note_and_remove)
    spec = site.spec(max_steps="3")
    assert site.train(spec, retention=Retention(states=1, best=1, newest=1))
    assert removed and [(version.run, version.step) for version in site.registry.versions()][-1] == (spec.run, 3)


def test_a_run_that_ends_between_state_and_version_publishes_the_version_when_it_resumes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = site.spec()
    site.train(whole)
    expected = [version.claimed_loss for version in site.registry.versions()]
    spec = site.spec()
    with refusing(monkeypatch, "publish_version"), pytest.raises(FailedPrecondition):
        site.train(spec)
    assert site.registry.states(spec.run)[-1] == 9
    assert site.train(spec)
    last = site.registry.versions()[-1]
    assert (last.run, last.step, last.claimed_loss) == (spec.run, 9, expected[-1])
    # Once it is there, nothing is left to do.
    site.told.clear()
    assert site.train(spec) and site.all_told(VersionPublished) == []


def test_a_run_that_diverges_fails_and_keeps_nothing(site: Site) -> None:
    site.train(site.spec())
    version = publish_overflowing_version(site.registry, 3)
    spec = site.spec(resume=version.version, max_steps="12")
    with pytest.raises(TrainingDiverged, match="training diverged"):
        site.train(spec)
    assert site.registry.states(spec.run) == [9]  # its own copy of what it continued
    assert site.registry.versions()[-1] == version


def test_retention_follows_the_settings(site: Site) -> None:
    spec = site.spec(evaluation_interval="1")
    site.train(spec, retention=Retention(states=1, best=1, newest=2, every=4))
    numbers = [version.version for version in site.registry.versions()]
    best = site.registry.labels()["best"]
    assert set(numbers) == {4, 8, 9, best}
    kept = {version.step for version in site.registry.versions() if version.version == best}
    assert set(site.registry.states(spec.run)) == {9} | kept


def test_a_run_on_other_text_has_no_best_loss_yet(site: Site) -> None:
    site.train(site.spec())
    site.told.clear()
    site.train(site.spec(resume=3, max_steps="12"))
    assert site.all_told(Progress)[0].best_validation_loss is not None
    site.told.clear()
    site.train(site.spec(resume=3, dataset=site.other_text, max_steps="12"))
    assert site.all_told(Progress)[0].best_validation_loss is None


def test_a_vocabulary_that_the_text_does_not_fill_is_that_of_the_run_for_good(site: Site) -> None:
    spec = site.spec(vocabulary_size="5000")
    assert not site.train(spec, stop_requested=lambda: bool(site.registry.states(spec.run)))
    assert any("not 5,000" in notice.text for notice in site.all_told(Notice))
    assert site.train(spec)
    versions = site.registry.versions()
    assert [version.step for version in versions] == [3, 6, 9]
    size = Tokenizer.load(site.registry.version_directory(3) / "tokenizer.json").vocabulary_size
    assert 257 < size < 5000
    assert {version.training["vocabulary_size"] for version in versions} == {size}
    assert {version.model["vocabulary_size"] for version in versions} == {size}
    site.told.clear()
    assert site.train(site.spec(resume=3, max_steps="12"))
    assert site.registry.version(4).training["vocabulary_size"] == size
    assert not any("vocabulary" in notice.text for notice in site.all_told(Notice))


def test_a_run_does_not_continue_with_other_text(site: Site) -> None:
    spec = site.spec()
    assert not site.train(spec, stop_requested=lambda: bool(site.registry.states(spec.run)))
    content = Path(site.text).read_text()
    site.write(Path(site.text), 500)
    with pytest.raises(FailedPrecondition, match=r"text\.txt has changed\. Put the old text back"):
        site.train(spec)
    Path(site.text).write_text(content)
    assert site.train(spec)


def test_continuing_a_version_on_changed_text_emits_a_notice(site: Site) -> None:
    site.train(site.spec())
    for change, said in ((lambda: None, 0), (lambda: site.write(Path(site.text), 500), 1)):
        change()
        site.told.clear()
        site.train(site.spec(resume=3, max_steps="12"))
        notices = [notice.text for notice in site.all_told(Notice)]
        assert (
            sum("text.txt has changed, or is read in another way, since version 3" in text for text in notices) == said
        )
    site.told.clear()
    evaluate_version(EvaluateSpec("3", DatasetSpec(())), site.attempt())
    assert any("text.txt has changed" in notice.text for notice in site.all_told(Notice))
    site.told.clear()
    site.train(site.spec(resume=3, dataset=site.other_text, max_steps="12"))
    evaluate_version(EvaluateSpec("3", DatasetSpec((site.other_text,))), site.attempt())
    assert not any("has changed" in notice.text for notice in site.all_told(Notice))


def test_a_new_schedule_emits_a_notice_with_its_rate(site: Site) -> None:
    site.train(site.spec())

    def told(**values: str) -> list[str]:
        site.told.clear()
        site.train(site.spec(resume=3 if values else None, **values))
        return [event.text for event in site.all_told(Notice) if "schedule" in event.text]

    (notice,) = told(max_steps="12")
    assert notice.startswith("A new schedule begins after step 9; its highest rate is ")
    (notice,) = told(max_steps="12", learning_rate="0.002")
    assert notice == "A new schedule begins after step 9; its highest rate is 2.0e-03."
    assert told() == []


def test_a_run_that_has_come_to_its_end_does_nothing_more(site: Site) -> None:
    spec = site.spec()
    assert site.train(spec)
    site.told.clear()
    assert site.train(spec)
    assert site.all_told(Progress) == [] and site.all_told(VersionPublished) == []


def test_a_run_keeps_the_version_with_the_best_evaluation_if_best_follows_evaluations(site: Site) -> None:
    site.train(site.spec())
    first = site.registry.versions()[0]
    assert site.registry.labels()["best"] != first.version
    write_record(site.registry, first, 1.5)
    sparing = Retention(states=1, best=0, newest=1, runs=0)
    site.told.clear()
    TrainingRun(site.spec(), replace(site.attempt(retention=sparing), best_by=BestBy.EVALUATION)).train()
    assert not any(published.best for published in site.all_told(VersionPublished))
    assert site.registry.versions()[0] == first
    site.train(site.spec(), retention=sparing)
    assert site.registry.versions()[0] != first


def evaluations(site: Site, version: int) -> list[dict[str, object]]:
    return [json.loads(path.read_text()) for path in site.registry.root.glob(f"evaluations/{version}/*.json")]


def test_a_version_is_measured_on_more_of_its_text_and_on_other_text(site: Site) -> None:
    site.train(site.spec())
    best = site.registry.version(site.registry.labels()["best"])
    site.told.clear()
    evaluate_version(EvaluateSpec("best", DatasetSpec(())), site.attempt())
    evaluate_version(EvaluateSpec(str(best.version), DatasetSpec((site.other_text,))), site.attempt())
    own, other = site.all_told(Evaluation)
    # Said once, by the event alone, and without a loss that was measured on something else.
    assert not any("nats" in notice.text for notice in site.all_told(Notice))
    assert (own.step, own.version, own.training_loss) == (best.step, best.version, None)
    assert (own.text, other.text) == ("text.txt", Path(site.other_text).name)
    assert abs(own.validation_loss - best.validation_loss) < 0.5 and own.validation_loss != other.validation_loss
    kept = {found["validation_loss"]: found for found in evaluations(site, best.version)}
    assert set(kept) == {own.validation_loss, other.validation_loss}
    assert int(str(kept[own.validation_loss]["windows"])) > 4  # as many as training looks at
    # Again, the same.
    evaluate_version(EvaluateSpec("best", DatasetSpec(())), site.attempt())
    assert site.all_told(Evaluation)[-1] == own and len(evaluations(site, best.version)) == 2
    site.registry.remove_version(best.version)
    assert evaluations(site, best.version) == []


def test_an_evaluation_on_validation_files_reads_no_other_text(site: Site, tmp_path: Path) -> None:
    site.train(site.spec())
    Path(site.text).unlink()
    evaluate_version(EvaluateSpec("best", DatasetSpec((), (site.other_text,))), site.attempt())
    measured = site.all_told(Evaluation)[-1]
    assert measured.text == "other.txt" and measured.windows
    short = tmp_path / "short.txt"
    short.write_text("Once")
    with pytest.raises(DataError, match=r"The held-out text of short\.txt holds \d tokens, .*: add text, or set"):
        evaluate_version(EvaluateSpec("best", DatasetSpec((), (str(short),))), site.attempt())


def test_an_evaluation_can_be_stopped_and_needs_its_version(site: Site) -> None:
    site.train(site.spec())
    asked = iter([False] * 5)
    with pytest.raises(Stopped):
        evaluate_version(EvaluateSpec("best", DatasetSpec(())), site.attempt(lambda: next(asked, True)))
    assert not list(site.registry.root.glob("evaluations/*/*"))
    with pytest.raises(NotFound, match="no version 9"):
        evaluate_version(EvaluateSpec("9", DatasetSpec(())), site.attempt())


def test_a_run_that_has_begun_does_not_need_the_version_that_it_continues(site: Site) -> None:
    site.train(site.spec())
    spec = site.spec(resume=3, max_steps="12")
    asked = iter([False] * 20)
    site.train(spec, stop_requested=lambda: next(asked, True) and bool(site.registry.states(spec.run)))
    parent = site.registry.version(3)
    site.registry.remove_version(3)
    site.registry.remove(Checkpoint(parent.step, parent.run))
    assert site.train(spec)
    assert site.registry.version(4).step == 12


def test_a_run_that_died_after_its_last_version_is_ended_by_the_next_attempt(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = site.spec()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Registry, "end_run", die)
        site.train(spec)
    assert not site.registry.has_ended(spec.run)
    assert site.train(spec)
    assert site.registry.has_ended(spec.run)
    assert len(site.registry.states(spec.run)) == 1


def test_an_earlier_attempt_cannot_take_a_run_back(site: Site) -> None:
    spec = site.spec()
    later = replace(site.attempt(), number=2)
    assert TrainingRun(spec, later).train()
    with pytest.raises(RunOwnershipLost):
        site.train(spec)


@pytest.mark.parametrize("spoil", ["tokenizer.json", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_state_that_is_damaged_costs_the_steps_since_the_one_before(site: Site, spoil: str, how: str) -> None:
    spec = site.spec()
    seen: list[int] = []

    def stop_requested() -> bool:
        seen[:] = site.registry.states(spec.run)
        return seen == [3, 6]

    assert not site.train(spec, stop_requested=stop_requested)
    newest = site.registry.state_directory(spec.run, site.registry.states(spec.run)[-1]) / spoil
    if how == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:-7])
    assert site.train(spec)
    assert any("An older state is used." in notice.text for notice in site.all_told(Notice))
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]
