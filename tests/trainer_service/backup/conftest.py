"""What is backed up, and where it is restored."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from tests.fakes import publish_tiny_version
from tests.redis_process import RedisServer
from tests.registries import root_of
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service.redis_client import RedisAddress
from trainer_service.settings import TrainerSettings, read_settings


def settings_of(var: Path, address: RedisAddress) -> TrainerSettings:
    return replace(read_settings({"GPTLOOP_VAR": str(var)}), redis=address)


def writing(content: bytes) -> Callable[[Path], None]:
    """Returns what writes the one file of a state."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return write


@pytest.fixture
def here(tmp_path: Path, redis_server: RedisServer, admin: Redis) -> TrainerSettings:
    """A folder with two versions, the state of one, and stories that were paid for."""
    settings = settings_of(tmp_path / "here", redis_server.address)
    registry = settings.open_registry()
    for bits_per_byte in (3.0, 1.0):
        publish_tiny_version(registry, bits_per_byte)
    fence = registry.take_over("wide")
    registry.write_state(fence, 7, writing(b"weights"))
    registry.decisions.set_stable(2)
    findings = root_of(registry) / "serving" / "findings"
    findings.mkdir()
    (findings / "2.cpu.json").write_text("{}")
    add_stories(settings.directories.data, tales(0, 3))
    return settings


@pytest.fixture
def there(tmp_path: Path, mortal_redis: RedisServer) -> TrainerSettings:
    """A new folder and an empty Redis."""
    return settings_of(tmp_path / "there", mortal_redis.address)
