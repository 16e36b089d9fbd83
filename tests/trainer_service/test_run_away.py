"""Runs whose registry is away for a while."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import StoreFailed, UnreadableCheckpoint
from shared.registry.disk_store import DiskStore
from shared.registry.disk_texts import FileTexts
from shared.registry.retention import Retention
from tests.registries import state_folder
from tests.trainer_service.site import Site
from trainer_service.jobs.events import Notice, RunStarted, VersionPublished
from trainer_service.run import TrainingRun
from trainer_service.training.evaluate import HeldOutLoss
from trainer_service.training.trainer import Trainer

pytestmark = pytest.mark.slow

_STEPS = 160


# A link to itself refuses every operation, as a file system that is gone does; one without a target is a disk that is
# not mounted.
@pytest.mark.parametrize("target", ["registry", "absent"])
def test_a_registry_that_goes_away_at_any_moment_costs_checkpoints_and_not_the_run(
    site: Site, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    root = site.directories.registry
    files, new = root.with_name("files"), root.with_name("new")
    files.mkdir(parents=True)

    def point_to(place: Path) -> None:
        new.symlink_to(place)
        new.replace(root)

    point_to(files)
    outages, uses, moment = list[bool](), 0, -1

    def counted(method: Callable[..., object]) -> Callable[..., object]:
        def use(*arguments: object, **named: object) -> object:
            nonlocal uses
            if uses == moment:
                point_to(root.with_name(target))
            uses += 1
            return method(*arguments, **named)

        return use

    for name, method in vars(DiskStore).items():
        if inspect.isfunction(method) and not name.startswith("_"):
            monkeypatch.setattr(DiskStore, name, counted(method))
    monkeypatch.setattr(FileTexts, "__getitem__", counted(FileTexts.__getitem__))
    checkpoint = TrainingRun.checkpoint

    def disturbed(run: TrainingRun, trainer: Trainer, held_out: HeldOutLoss) -> None:
        nonlocal uses, moment
        # In each second checkpoint it goes away, three uses later each time; those between remove what is old.
        uses, moment = 0, trainer.step // 2 * 3 if trainer.step % 2 else -1
        checkpoint(run, trainer, held_out)
        if moment >= 0:
            outages.append(root.readlink() != files)
        moment = -1
        point_to(files)

    monkeypatch.setattr(TrainingRun, "checkpoint", disturbed)
    spec = site.spec(max_steps=str(_STEPS), evaluation_interval="1")
    assert site.train(spec, retention=Retention(states=1, best=1, newest=1))
    # From some moment on, a checkpoint had ended before it: there is no later one.
    whole = outages.index(False)
    assert whole >= 20
    published = [event.version for event in site.all_told(VersionPublished)]
    assert len(set(published)) == len(published) >= _STEPS // 2 + outages.count(False)
    last = site.registry.versions()[-1]
    assert (last.version, last.step) == (published[-1], _STEPS)


def test_a_run_whose_states_cannot_be_read_now_does_not_begin_again(site: Site) -> None:
    spec = site.spec()
    assert not site.train(spec, stop_requested=lambda: site.registry.states(spec.run) == [3, 6])
    steps = site.registry.states(spec.run)
    weights = {step: state_folder(site.registry, spec.run, step) / "model.safetensors" for step in steps}
    for step, path in weights.items():
        path.rename(site.directories.var / str(step))
        path.symlink_to(path)
    with pytest.raises(StoreFailed, match="cannot be read: Too many levels"):
        site.train(spec)
    for step, path in weights.items():
        (site.directories.var / str(step)).replace(path)
    assert site.train(spec)
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]
    assert [event.first_step for event in site.all_told(RunStarted)] == [1, steps[-1] + 1]


def test_a_version_that_cannot_be_read_now_is_not_continued_but_tried_again(site: Site) -> None:
    before = site.spec(max_steps="3")
    assert site.train(before)
    spec = site.spec(resume=1, max_steps="6")
    weights = state_folder(site.registry, before.run, 3) / "model.safetensors"
    weights.rename(site.directories.var / "aside")
    weights.symlink_to(weights)
    with pytest.raises(UnreadableCheckpoint, match="cannot be read: Too many levels"):
        site.train(spec)
    (site.directories.var / "aside").replace(weights)
    assert site.train(spec)


def test_versions_that_cannot_be_removed_are_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "versions/1")

    monkeypatch.setattr("shared.registry.staging.move", refuse)
    assert site.train(site.spec(evaluation_interval="1"), retention=Retention(states=1, best=1, newest=1))
    notices = [event.text for event in site.all_told(Notice)]
    assert any(text.startswith("Nothing old was removed: ") and "Permission denied" in text for text in notices)
