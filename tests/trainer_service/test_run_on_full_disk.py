"""Runs whose disk, or registry, takes no checkpoint for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from shared.errors import FailedPrecondition
from shared.registry.history import HistoryWriter, Line
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention
from tests.trainer_service.site import Site
from trainer_service.jobs.events import Notice, Progress, VersionPublished

pytestmark = pytest.mark.slow


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 100 bytes to file.")

    with monkeypatch.context() as patch:
        patch.setattr(mx, "save_safetensors", refuse)
        yield


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
