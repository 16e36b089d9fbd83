"""The commit of a version in two objects."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from shared.errors import RunOwnershipLost
from shared.registry.bucket import Bucket, Conflict
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord
from shared.registry.object_files import ObjectFiles
from shared.registry.object_runs import ObjectRuns
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.proxy import FaultyProxy
from tests.object_storage.server import Place
from tests.shared.registry.object_store.places import open_at, use
from tests.shared.registry.scenarios import RUN, make_manifest, publish, write_model

pytestmark = pytest.mark.slow


def test_a_version_that_a_replaced_owner_creates_in_the_last_moment_is_never_seen(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    publish(registry, fence)
    others: list[Fence] = []

    def replaced_meanwhile(number: int, files: object) -> object:
        # After the check of the fence, before the number is taken.
        others.append(open_at(place, tmp_path / "other").take_over(RUN))
        return make_manifest(number, files)  # type: ignore[arg-type]

    with pytest.raises(RunOwnershipLost):
        registry.publish_version(fence, write_model, replaced_meanwhile)  # type: ignore[arg-type]
    assert [each.version for each in registry.versions()] == [1]
    assert publish(registry, others[0]).version == 3


def test_a_state_of_an_owner_who_is_replaced_during_the_upload_is_not_committed(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = ObjectFiles.upload

    def replaced_meanwhile(files: ObjectFiles, folder: Path, records: Sequence[FileRecord]) -> str:
        open_at(place, tmp_path / "other").take_over(RUN)
        return upload(files, folder, records)

    monkeypatch.setattr(ObjectFiles, "upload", replaced_meanwhile)
    with pytest.raises(RunOwnershipLost):
        registry.write_state(fence, 1, write_model)
    assert registry.states(RUN) == [] and Bucket(place.url).list("files") == []


def test_a_state_that_was_committed_unconfirmed_before_the_next_owner_keeps_its_files(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_at(place, tmp_path / "other")
    replace = Bucket.replace

    def unconfirmed(self: Bucket, name: str, content: bytes, e_tag: str) -> None:
        replace(self, name, content, e_tag)
        monkeypatch.setattr(Bucket, "replace", replace)
        other.take_over(RUN)
        raise Conflict(name)

    monkeypatch.setattr(Bucket, "replace", unconfirmed)
    registry.write_state(fence, 1, write_model)
    other.check(Checkpoint(1, RUN))
    with pytest.raises(RunOwnershipLost):
        registry.write_state(fence, 2, write_model)


def test_a_version_of_a_replaced_owner_who_died_is_never_seen(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, fence)
    newer: list[Fence] = []

    def die(runs: ObjectRuns, run: str, token: int, number: int) -> bool:
        raise KeyboardInterrupt

    def replaced_meanwhile(number: int, files: object) -> object:
        newer.append(open_at(place, tmp_path / "other").take_over(RUN))
        monkeypatch.setattr(ObjectRuns, "owned", die)
        return make_manifest(number, files)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        registry.publish_version(fence, write_model, replaced_meanwhile)  # type: ignore[arg-type]
    monkeypatch.undo()
    use(place, monkeypatch)
    reader = open_at(place, tmp_path / "reader")
    assert [each.version for each in reader.versions()] == [1] and publish(reader, newer[0]).version == 3
    assert [each.version for each in reader.versions()] == [1, 3]


def test_a_takeover_whose_owner_died_in_the_middle_is_settled_by_the_next_reader(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    other = open_at(place, tmp_path / "other")
    with monkeypatch.context() as patched:
        patched.setattr(ObjectRuns, "_settle", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            other.take_over(RUN)
    assert open_at(place, tmp_path / "reader").versions() == [version]
    with pytest.raises(RunOwnershipLost):
        publish(registry, fence)
