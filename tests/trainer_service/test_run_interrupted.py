"""Runs that wait at a step, or die at any line, and go on."""

import math
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import FailedPrecondition
from shared.gpt.weights import load_arrays
from shared.registry.history import HistoryWriter, Line
from shared.registry.registry import Registry
from tests.registries import state_folder
from tests.trainer_service.site import Site
from trainer_service.jobs.attempt import Suspended
from trainer_service.jobs.events import Evaluation, Notice, Progress, VersionPublished
from trainer_service.jobs.specs import TrainSpec
from trainer_service.run import TrainingRun

pytestmark = pytest.mark.slow


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
