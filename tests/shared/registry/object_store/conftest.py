"""A registry in object storage, behind a proxy that can fail requests."""

from pathlib import Path

import pytest

from shared.registry import bucket
from shared.registry.fence import Fence
from shared.registry.registry import Registry
from tests.object_storage.proxy import FaultyProxy
from tests.object_storage.server import ObjectServer, Place
from tests.shared.registry.object_store.places import open_at, use
from tests.shared.registry.scenarios import RUN


@pytest.fixture
def place(object_server: ObjectServer, object_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = object_server.place().behind(object_proxy.endpoint)
    use(place, monkeypatch)
    # A silent store costs a test these seconds.
    monkeypatch.setattr(bucket, "_REQUEST_S", 1.0)
    monkeypatch.setattr(bucket, "_RETRY_S", 4.0)
    return place


@pytest.fixture
def registry(place: Place, tmp_path: Path) -> Registry:
    return open_at(place, tmp_path / "cache")


@pytest.fixture
def fence(registry: Registry) -> Fence:
    return registry.take_over(RUN)
