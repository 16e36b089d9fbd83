"""Registries in folders, and where their files are."""

import os
from pathlib import Path

from shared.registry.decisions import BestBy
from shared.registry.disk_store import DiskStore
from shared.registry.registry import Registry
from shared.service.settings import read_directories


def disk_registry(root: Path, best_by: BestBy = BestBy.TRAINING) -> Registry:
    return Registry(DiskStore(root), best_by)


def registry_id(root: Path) -> str:
    return DiskStore(root).id()


def root_of(registry: Registry) -> Path:
    assert isinstance(registry.store, DiskStore)
    return registry.store.root


def version_folder(registry: Registry, number: int) -> Path:
    return root_of(registry) / "versions" / str(number)


def run_folder(registry: Registry, run: str) -> Path:
    return root_of(registry) / "runs" / run


def state_folder(registry: Registry, run: str, step: int) -> Path:
    return run_folder(registry, run) / "states" / str(step)


def evaluation_folder(registry: Registry, number: int) -> Path:
    return root_of(registry) / "evaluations" / str(number)


def own_registry() -> Registry:
    """Returns the registry that the variables of this process name."""
    return read_directories(os.environ).open_registry()
