"""How many requests are made."""

from pathlib import Path

import pytest

from shared.errors import StoreFailed
from shared.registry import object_versions
from shared.registry.fence import Fence
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.proxy import Fault, FaultyProxy
from tests.object_storage.server import Place
from tests.shared.registry.object_store.places import open_at
from tests.shared.registry.scenarios import RUN, make_line, publish

pytestmark = pytest.mark.slow


def test_a_look_reads_only_what_is_new(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    reader = open_at(place, tmp_path / "other")
    for _ in range(3):
        publish(registry, fence)
    assert len(reader.versions()) == 3
    object_proxy.clear()
    assert len(reader.versions()) == 3
    assert [request.lists for request in object_proxy.requests] == [True]
    publish(registry, fence)
    registry.remove(Checkpoint(1))
    object_proxy.clear()
    assert [each.version for each in reader.versions()] == [2, 3, 4]
    assert [each.path.rpartition("/")[2] for each in object_proxy.requests if each.reads("/versions/")] == ["4"]


def test_many_versions_are_read_once_on_a_machine(
    place: Place,
    registry: Registry,
    fence: Fence,
    object_proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_versions, "_MANY", 3)
    versions = [publish(registry, fence) for _ in range(4)]
    registry.remove(Checkpoint(1))
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]
    object_proxy.clear()
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]
    assert not [each for each in object_proxy.requests if each.reads("/versions/")]
    (tmp_path / "cache" / registry.store.id() / "versions.json").write_text("{")
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]


def test_reports_are_no_requests_until_they_are_synced(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy
) -> None:
    writer = registry.histories.writer(fence, 0)
    writer.append(make_line(1))
    object_proxy.clear()
    for step in range(2, 100):
        writer.append(make_line(step))
    assert object_proxy.requests == []
    writer.append(make_line(100), synced=True)
    assert 0 < len(object_proxy.requests) < 6
    assert len(registry.histories.read(RUN).evaluations) == 100


def test_a_store_that_fails_costs_no_lines_but_time(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy
) -> None:
    writer = registry.histories.writer(fence, 0)
    writer.append(make_line(1), synced=True)
    object_proxy.inject(Fault.ERROR_500, times=None)
    with pytest.raises(StoreFailed, match=r"answers with status 500 \(InternalError\)"):
        writer.append(make_line(2), synced=True)
    object_proxy.clear()
    writer.append(make_line(3), synced=True)
    assert [each.step for each in registry.histories.read(RUN).evaluations] == [1, 2, 3]
