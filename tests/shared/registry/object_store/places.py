"""Registries in object storage, and requests to it."""

from pathlib import Path

import pytest

from shared.registry.object_store import ObjectStore
from shared.registry.registry import Registry
from tests.object_storage.proxy import Request
from tests.object_storage.server import Place


def use(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)


def open_at(place: Place, cache: Path, limit_bytes: int = 1 << 30) -> Registry:
    return Registry(ObjectStore(place.url, cache, limit_bytes))


def store_of(registry: Registry) -> ObjectStore:
    assert isinstance(registry.store, ObjectStore)
    return registry.store


def is_commit(request: Request) -> bool:
    return request.conditional and request.writes("/versions/")


def is_change(request: Request) -> bool:
    return request.conditional and request.writes("/texts/runs/")
