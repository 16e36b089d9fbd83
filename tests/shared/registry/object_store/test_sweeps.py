"""Removing what dead processes left."""

from pathlib import Path

import pytest

from shared.registry import object_files, object_runs, object_versions
from shared.registry.bucket import Bucket
from shared.registry.fence import Fence
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.server import Place
from tests.shared.registry.object_store.places import open_at
from tests.shared.registry.scenarios import RUN, publish, write_model

pytestmark = pytest.mark.slow


def abandon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what is left behind count as old."""
    for module in (object_files, object_versions):
        monkeypatch.setattr(module, "ABANDONED_S", -1.0)


def test_what_dead_processes_leave_goes_after_a_day(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = Bucket(place.url), registry.store.id()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "create", die)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, fence)
    version = publish(registry, fence)
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            registry.write_state(fence, 1, write_model)
    registry.sweep()
    assert len(plain.list("files")) == 6 and len(plain.list("staging")) == 2
    abandon(monkeypatch)
    registry.sweep()
    assert plain.list("staging") == [] and len(plain.list("files")) == 4
    registry.check(Checkpoint(version.version))
    registry.check(Checkpoint(1, RUN))


@pytest.mark.parametrize("checkpoint", [Checkpoint(1), Checkpoint(1, RUN)], ids=str)
def test_what_a_dead_process_was_about_to_remove_is_shown_again(
    place: Place,
    registry: Registry,
    fence: Fence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
) -> None:
    publish(registry, fence)
    registry.write_state(fence, 1, write_model)

    def die() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.remove(checkpoint, unless=die)
    other = open_at(place, tmp_path / "other")
    assert checkpoint not in other.checkpoints()
    other.sweep()
    assert checkpoint not in other.checkpoints()
    for module in (object_runs, object_versions):
        monkeypatch.setattr(module, "HIDDEN_S", -1.0)
    other.sweep()
    assert checkpoint in other.checkpoints()
    other.check(checkpoint)


@pytest.mark.parametrize("checkpoint", [Checkpoint(1), Checkpoint(1, RUN)], ids=str)
def test_what_was_shown_again_during_a_long_removal_is_not_removed(
    place: Place,
    registry: Registry,
    fence: Fence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
) -> None:
    publish(registry, fence)
    registry.write_state(fence, 1, write_model)
    other = open_at(place, tmp_path / "other")
    for module in (object_runs, object_versions):
        monkeypatch.setattr(module, "HIDDEN_S", -1.0)

    def pause() -> bool:
        other.sweep()
        return False

    assert not registry.remove(checkpoint, unless=pause)
    other.check(checkpoint)


def test_a_sweep_keeps_the_files_of_a_version_that_is_hidden(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    id = registry.store.state(f"versions/{version.version}")
    # Its publisher died before it removed this object.
    Bucket(place.url).upload(f"staging/{id}", b"files")
    other = open_at(place, tmp_path / "other")
    abandon(monkeypatch)

    def is_needed() -> bool:
        other.sweep()
        return True

    assert not registry.remove(Checkpoint(version.version), unless=is_needed)
    other.check(Checkpoint(version.version))


def test_empty_objects_of_old_removals_go_but_not_that_of_the_highest_number(
    place: Place, registry: Registry, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        publish(registry, fence)
    for number in (1, 3):
        registry.remove(Checkpoint(number))
    abandon(monkeypatch)
    registry.sweep()
    assert [each.name for each in Bucket(place.url).list("versions")] == ["versions/2", "versions/3"]
    assert publish(registry, fence).version == 4
