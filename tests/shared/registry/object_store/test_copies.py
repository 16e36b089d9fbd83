"""Local copies of what is in object storage."""

import os
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from shared.registry.fence import Fence
from shared.registry.registry import Registry
from tests.object_storage.proxy import FaultyProxy
from tests.object_storage.server import Place
from tests.shared.registry.object_store.places import open_at
from tests.shared.registry.scenarios import publish

pytestmark = pytest.mark.slow


def test_a_copy_is_fetched_once_and_again_if_it_was_damaged(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    version = publish(registry, fence)
    object_proxy.clear()
    folder = registry.verified(version)
    reader = open_at(place, tmp_path / "cache")
    assert reader.verified(version) == folder
    assert not [each for each in object_proxy.requests if each.reads("/files/")]
    (folder / "config.json").write_text("[]")
    assert (reader.verified(version) / "config.json").read_text() == "{}"
    assert len([each for each in object_proxy.requests if each.reads("/files/")]) == 2


def test_copies_have_at_most_their_size_and_the_newest_stay(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.registry.object_cache._HELD", 1)
    versions = [publish(registry, fence) for _ in range(4)]
    size_bytes = versions[0].size_bytes + len(versions[0].to_json())
    reader = open_at(place, tmp_path / "small", limit_bytes=2 * size_bytes)
    other = open_at(place, tmp_path / "small", limit_bytes=2 * size_bytes)
    first = reader.fetch(versions[0])
    os.utime(first, (0, 0))
    kept = [other.fetch(version) for version in versions[1:]]
    # What another process has fetched last stays, however old it is.
    assert first.is_dir() and kept[-1].is_dir() and not kept[0].exists() and not kept[1].exists()
    assert (other.fetch(versions[1]) / "config.json").read_text() == "{}"


def test_a_copy_that_finds_no_room_is_an_error(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written: Not a directory"):
        open_at(place, tmp_path / "file").fetch(version)
