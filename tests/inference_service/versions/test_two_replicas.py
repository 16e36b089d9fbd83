"""Two replicas on one registry: each follows it for itself, and what one finds or is told holds for both."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from shared.decoding.cpu.decoder import CpuDecoder
from shared.registry.decisions import BestBy
from shared.registry.object_store import ObjectStore
from shared.registry.registry import Registry
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.world import World, polls
from tests.object_storage.server import MISSING, is_installed
from tests.waiting import eventually

pytestmark = pytest.mark.slow


# Opens a new replica, which looks at the registry and examines for itself.
Open = Callable[[], World]


@pytest.fixture(params=["folder", "bucket"])
def replica(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Replicas share a folder, or a bucket of which each has copies of its own."""
    if request.param == "folder":
        return lambda: World(tmp_path / "registry")
    if not is_installed():
        pytest.skip(MISSING)
    place = request.getfixturevalue("object_server").place()
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)
    caches = count()

    def bucket(root: Path, best_by: BestBy) -> Registry:
        return Registry(ObjectStore(place.url, root / f"cache-{next(caches)}", 1 << 30), best_by)

    return lambda: World(tmp_path, open_registry=bucket)


@async_test
async def test_each_replica_follows_the_registry_for_itself(replica: Open) -> None:
    fresh, other = replica(), replica()
    async with fresh.running(), other.running():
        for number, bits_per_byte in enumerate((2.0, 1.0), 1):
            publish_tiny_version(fresh.registry, bits_per_byte)
            await fresh.serves(number)
            await other.serves(number)
    # One that was away finds what was published meanwhile.
    publish_tiny_version(fresh.registry, 0.5)
    late = replica()
    async with late.running(serving=3):
        pass


@async_test
async def test_what_one_replica_finds_another_of_its_kind_of_device_does_not_examine_again(
    replica: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, other = replica(), replica()
    async with fresh.running():
        publish_tiny_version(fresh.registry, 2.0)
        publish_tiny_version(fresh.registry, 1.0, better_by=0.1)
        await eventually(lambda: len(fresh.registry.decisions.findings()) == 2)
        monkeypatch.setattr(CpuDecoder, "score", lambda *_: pytest.fail("It is examined again."))
        async with other.running(serving=1):
            await polls(other)
            assert other.serving == 1
            second = (await other.manager.statuses())[1]
            assert second.reason.startswith("loss_mismatch")


@async_test
async def test_a_pin_a_promotion_and_a_rollback_hold_for_every_replica(replica: Open) -> None:
    fresh, other = replica(), replica()
    for bits_per_byte in (3.0, 2.0, 1.0):
        publish_tiny_version(fresh.registry, bits_per_byte)
    async with fresh.running(serving=3), other.running(serving=3):
        await fresh.manager.set_policy("pinned:1")
        await other.serves(1)
        publish_tiny_version(fresh.registry, 0.5)
        await polls(other)
        assert other.serving == 1
        await other.manager.promote(2)
        await other.manager.set_policy("stable")
        await fresh.serves(2)
        await fresh.manager.set_policy("best")
        await other.serves(4)
        await other.manager.roll_back(None)
        # What is in memory may serve first, but the best of the others does in the end.
        for each in (fresh, other):
            await each.serves(3)
        assert (await fresh.manager.statuses())[3].reason.startswith("rolled_back")
