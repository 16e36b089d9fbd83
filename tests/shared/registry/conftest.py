from pathlib import Path

import pytest

from shared.registry.registry import Registry
from tests.registries import disk_registry


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path / "registry")
