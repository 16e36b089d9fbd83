"""Runs from their jobs on, without queue or worker: a tiny model on a text file."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import FailedPrecondition, RunOwnershipLost, TrainingDiverged
from shared.gpt.tokenizer import Tokenizer
from shared.gpt.weights import load_arrays
from shared.registry.decisions import BestBy
from shared.registry.history import HistoryWriter, Line
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention
from tests.fakes import publish_overflowing_version
from tests.records import write_record
from tests.registries import state_folder, version_folder
from tests.trainer_service.site import Site
from trainer_service.evaluation.job import evaluate_version
from trainer_service.jobs.attempt import Stopped, Suspended
from trainer_service.jobs.events import Evaluation, Notice, Progress, VersionPublished
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec, TrainSpec
from trainer_service.run import TrainingRun
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow


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

    def note_and_remove(registry: Registry, checkpoint: Checkpoint, unless: Callable[[], bool]) -> bool:
        removed.append(checkpoint)
        return remove(registry, checkpoint, unless)

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
    size = Tokenizer.load(version_folder(site.registry, 3) / "tokenizer.json").vocabulary_size
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
    evaluate_version(EvaluateSpec("3", DatasetSpec(()), speed=False), site.attempt())
    assert any("text.txt has changed" in notice.text for notice in site.all_told(Notice))
    site.told.clear()
    site.train(site.spec(resume=3, dataset=site.other_text, max_steps="12"))
    evaluate_version(EvaluateSpec("3", DatasetSpec((site.other_text,)), speed=False), site.attempt())
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


def test_a_run_that_has_begun_does_not_need_the_version_that_it_continues(site: Site) -> None:
    site.train(site.spec())
    spec = site.spec(resume=3, max_steps="12")
    asked = iter([False] * 20)
    site.train(spec, stop_requested=lambda: next(asked, True) and bool(site.registry.states(spec.run)))
    parent = site.registry.version(3)
    site.registry.remove(Checkpoint(3))
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
    newest = state_folder(site.registry, spec.run, site.registry.states(spec.run)[-1]) / spoil
    if how == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:-7])
    assert site.train(spec)
    assert any("An older state is used, if there is one." in notice.text for notice in site.all_told(Notice))
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]


def arrays(site: Site, run: str, step: int) -> dict[str, bytes]:
    folder = state_folder(site.registry, run, step)
    files = (folder / name for name in ("model.safetensors", "optimizer.safetensors"))
    return {
        f"{path.stem}/{name}": np.array(array).tobytes() for path in files for name, array in load_arrays(path).items()
    }


def to_step(site: Site, spec: TrainSpec, until: int, number: int = 1) -> Evaluation:
    """Trains an attempt that comes to the step at which its job waits."""
    with pytest.raises(Suspended) as suspended:
        TrainingRun(replace(spec, until=until), replace(site.attempt(), number=number)).train()
    return suspended.value.evaluation


def test_a_run_that_waits_at_steps_ends_with_the_same_bits_as_one_that_does_not(site: Site) -> None:
    whole, stepwise = (site.spec(dropout="0.1") for _ in range(2))
    assert site.train(whole)
    published = {version.step: version for version in site.registry.versions()}
    for number, step in enumerate((3, 6), start=1):
        evaluation = to_step(site, stepwise, step, number)
        assert (evaluation.step, evaluation.validation_loss) == (step, published[step].validation_loss)
        assert site.registry.states(stepwise.run)[-1] == step and not site.registry.has_ended(stepwise.run)
    assert TrainingRun(replace(stepwise, until=9), replace(site.attempt(), number=3)).train()
    assert site.registry.has_ended(stepwise.run)
    assert arrays(site, stepwise.run, 9) == arrays(site, whole.run, 9)
    evaluations = [site.registry.histories.read(spec.run).evaluations for spec in (whole, stepwise)]
    losses = [[(each.step, each.validation_loss) for each in lines] for lines in evaluations]
    assert losses[0] == losses[1]


def test_a_run_that_dies_at_its_step_is_evaluated_once_and_reports_its_loss(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = site.spec()

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainingRun, "_suspend", die)
        TrainingRun(replace(spec, until=3), site.attempt()).train()
    site.told.clear()
    evaluation = to_step(site, spec, 3, number=2)
    (version,) = site.registry.versions()
    assert (evaluation.step, evaluation.validation_loss) == (3, version.validation_loss)
    assert site.all_told(Progress) == [] and site.all_told(VersionPublished) == []


def test_a_registry_that_fails_once_at_the_step_of_a_run_has_its_state_before_it_waits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, write, calls = site.spec(), Registry.write_state, list[object]()

    def fail_once(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise FailedPrecondition("The registry cannot be written.")
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Registry, "write_state", fail_once)
    to_step(site, spec, 3)
    assert site.registry.states(spec.run) == [3] and [each.step for each in site.registry.versions()] == [3]
    assert not any("without this checkpoint" in notice.text for notice in site.all_told(Notice))


class Killed(BaseException):
    """Ends an attempt as SIGKILL does: nothing catches it."""


def test_a_run_killed_before_or_after_any_line_ends_with_the_history_of_one_that_was_not(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = HistoryWriter.append
    calls = 0

    def train(spec: TrainSpec, kill_at: float, after: bool) -> None:
        nonlocal calls
        calls = 0

        def append_or_die(writer: HistoryWriter, *lines: Line, synced: bool = False) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at and not after:
                raise Killed
            append(writer, *lines, synced=synced)
            if calls == kill_at:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(HistoryWriter, "append", append_or_die)
            site.train(spec)

    whole = site.spec()
    train(whole, math.inf, after=True)
    count, expected = calls, site.registry.histories.read(whole.run)
    assert [line.step for line in expected.reports] == [1, 3, 6, 9]
    for kill_at in range(1, count + 1):
        for after in (False, True):
            spec = site.spec()
            with pytest.raises(Killed):
                train(spec, kill_at, after)
            train(spec, math.inf, after=True)
            history = site.registry.histories.read(spec.run)
            steps = [line.step for line in history.reports]
            assert steps == sorted({*steps, 3, 6, 9}), (kill_at, after)
            losses = {line.step: line.gradient_norm for line in history.reports}
            assert all(losses.get(line.step, line.gradient_norm) == line.gradient_norm for line in expected.reports)
            evaluated = [(line.step, line.validation_loss, line.bits_per_byte) for line in expected.evaluations]
            assert [(line.step, line.validation_loss, line.bits_per_byte) for line in history.evaluations] == evaluated
            versions = {line.version: line.step for line in history.evaluations}
            present = {each.version: each.step for each in site.registry.versions() if each.run == spec.run}
            assert present.items() <= versions.items() and None not in versions, (kill_at, after)


def test_a_disk_that_refuses_the_history_costs_lines_and_not_the_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, refused = HistoryWriter.append, list[object]()

    def refuse_at_first(writer: HistoryWriter, *lines: Line, synced: bool = False) -> None:
        if len(refused) < 5:
            refused.append(lines)
            raise FailedPrecondition("The registry cannot be written.")
        append(writer, *lines, synced=synced)

    monkeypatch.setattr(HistoryWriter, "append", refuse_at_first)
    spec = site.spec()
    assert site.train(spec)
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]
    (notice,) = [each.text for each in site.all_told(Notice) if "history" in each.text]
    assert notice == "The registry cannot be written. The history of the run lacks lines until it can be written."
    history = site.registry.histories.read(spec.run)
    assert [line.step for line in history.evaluations] == [6, 9]
