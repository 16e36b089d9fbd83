"""Versions that are rolled back after they served: by an operator, or because their streams fail."""

import asyncio
from pathlib import Path

import pytest

from inference_service.versions.planner import State
from shared.errors import FailedPrecondition, GptloopError
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import flip_a_bit
from tests.inference_service.world import World, hold_read, polls, status
from tests.registries import disk_registry, root_of, version_folder
from tests.waiting import eventually


@async_test
async def test_a_rollback_goes_to_the_next_version_of_the_policy_and_stays(world: World) -> None:
    async with world.running(2):
        assert await world.manager.roll_back() == 3
        await world.serves(3)
        await polls(world)
        assert world.serving == 3
        two = await status(world, 2)
        assert (two.state, two.reason) == (State.REFUSED, "rolled_back: an operator rolled it back")
        assert (await status(world, 3)).labels == ("best", "latest")
        # A better one takes over as usual.
        publish_tiny_version(world.registry, 0.5)
        await world.serves(4)


@async_test
async def test_a_rollback_to_a_version_in_memory_takes_no_time(world: World) -> None:
    async with world.running(2), world.residents.stream(None) as old:
        publish_tiny_version(world.registry, 0.5)
        await world.serves(4)
        assert await world.manager.roll_back() == 2
        assert world.serving == 2 and world.manager.serving is old


@async_test
async def test_a_rollback_does_not_wait_for_room(world: World) -> None:
    async with world.running(2):
        async with world.residents.stream(None):
            publish_tiny_version(world.registry, 0.5)
            await world.serves(4)
            async with world.residents.stream(None):
                assert await world.manager.roll_back(1) == 1
                assert world.serving == 1
                assert world.resident() == {"1", "2", "4"}
                assert world.catalogue.policy == "pinned:1"
        # Version 4 is refused, version 2 has room.
        await eventually(lambda: world.resident() == {"1", "2"})


def in_the_way(world: World) -> Path:
    """Makes the folder of decisions unwritable, even for root."""
    folder = root_of(world.registry) / "serving"
    folder.rename(root_of(world.registry) / "kept")
    folder.write_text("in the way")
    return folder


@pytest.mark.parametrize("number", [None, 1])
@async_test
async def test_a_rollback_that_cannot_be_written_fails_and_changes_nothing(world: World, number: int | None) -> None:
    async with world.running(2):
        await eventually(lambda: bool(world.registry.decisions.findings()))
        in_the_way(world)
        with pytest.raises(FailedPrecondition, match="cannot be written"):
            await world.manager.roll_back(number)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")
        assert (await status(world, 2)).state is State.SERVING
        assert world.value("refused_versions_total", reason="rolled_back") == 0


@pytest.mark.parametrize("what", ["best", "latest", "stable", "pinned:1", "run:tiny"])
@async_test
async def test_a_policy_that_cannot_be_written_does_not_take_effect(world: World, what: str) -> None:
    async with world.running(2):
        await world.manager.promote(3)
        in_the_way(world)
        with pytest.raises(FailedPrecondition):
            await world.manager.set_policy(what)
        with pytest.raises(FailedPrecondition):
            await world.manager.promote(1)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")


@async_test
async def test_a_rollback_is_in_the_registry_when_it_returns(world: World) -> None:
    async with world.running(2):
        await world.manager.roll_back(1)
        reader = disk_registry(root_of(world.registry))
        assert reader.decisions.policy() == "pinned:1"
        assert [each.refusal for each in reader.decisions.findings()[2]] == ["rolled_back"]


@async_test
async def test_a_rollback_to_a_damaged_version_fails_and_the_serving_one_stays(world: World) -> None:
    flip_a_bit(version_folder(world.registry, 1))

    async with world.running(2):
        with pytest.raises(FailedPrecondition, match=r"Version 1 cannot serve: .*SHA-256"):
            await world.manager.roll_back(1)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")
        assert (await status(world, 2)).state is State.SERVING
        assert world.resident() == {"2"}
    restarted = World(root_of(world.registry))

    async with restarted.running():
        await restarted.serves(2)


@async_test
async def test_a_rollback_takes_the_next_version_that_can_be_loaded(world: World) -> None:
    flip_a_bit(version_folder(world.registry, 3))

    async with world.running(2):
        assert await world.manager.roll_back() == 1
        assert world.serving == 1
        with pytest.raises(FailedPrecondition, match="no other version than 1 that could serve, so it serves on"):
            await world.manager.roll_back()
        assert world.serving == 1


@async_test
async def test_the_serving_version_stays_until_its_successor_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hold_read(monkeypatch, 1)

    async with world.running(2):
        rolling = asyncio.create_task(world.manager.roll_back(1))
        await eventually(reading.entered.is_set)
        async with world.residents.stream(None) as resident:
            assert resident.manifest.version == 2
        assert world.catalogue.policy == "best"
        reading.go_on.set()
        assert await rolling == 1
        assert world.serving == 1


@async_test
async def test_a_cancelled_rollback_changes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = hold_read(monkeypatch, 1)

    async with world.running(2):
        rolling = asyncio.create_task(world.manager.roll_back(1))
        await eventually(reading.entered.is_set)
        rolling.cancel()
        reading.go_on.set()
        await asyncio.wait([rolling])
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")


@async_test
async def test_the_same_rollback_twice_at_once_refuses_one_version(world: World) -> None:
    async with world.running(2):
        await asyncio.gather(world.manager.roll_back(1), world.manager.roll_back(1))
        assert world.serving == 1
        assert (await status(world, 1)).state is State.SERVING


@async_test
async def test_a_rollback_refuses_the_version_that_served_when_it_began(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the pin lets the other version serve before the refusal is noted."""

    async with world.running(2):
        await world.manager.load(1)
        look = world.catalogue.look

        async def look_and_follow() -> None:
            await look()
            world.manager.replan()

        monkeypatch.setattr(world.catalogue, "look", look_and_follow)
        assert await world.manager.roll_back(1) == 1
        assert world.serving == 1
        assert (await status(world, 2)).state is State.REFUSED


@async_test
async def test_the_only_version_cannot_be_rolled_back(tmp_path: Path) -> None:
    world = World(tmp_path / "registry")

    async with world.running():
        with pytest.raises(FailedPrecondition, match="No version serves"):
            await world.manager.roll_back()
        publish_tiny_version(world.registry, 1.0)
        await world.serves(1)
        with pytest.raises(FailedPrecondition, match="no other version"):
            await world.manager.roll_back()
        with pytest.raises(FailedPrecondition, match="serves already"):
            await world.manager.roll_back(1)
        for _ in range(10):
            world.manager.failed(1, GptloopError("no"))
        assert (world.serving, (await status(world, 1)).state) == (1, State.SERVING)


@async_test
async def test_a_pinned_label_never_means_another_version(world: World) -> None:
    async with world.running(2):
        await world.manager.set_policy("pinned:1")
        await world.serves(1)
        await world.manager.roll_back()
        await eventually(lambda: world.serving != 1)
        assert world.catalogue.policy == "pinned:1"
        manifest = await world.catalogue.resolve("pinned:1")
        assert manifest is not None and manifest.version == 1


@async_test
async def test_a_rolled_back_version_that_is_still_in_memory_can_be_loaded_again(world: World) -> None:
    async with world.running(2), world.residents.stream(None):
        await world.manager.load(2)
        await world.manager.roll_back()
        await world.serves(3)
        two = await status(world, 2)
        assert (two.state, two.held, two.streams) == (State.REFUSED, False, 1)
        await world.manager.load(2)
        await world.serves(2)


@async_test
async def test_a_version_whose_streams_keep_failing_is_rolled_back(world: World) -> None:
    async with world.running(2):
        step = GptloopError("a step of eight streams failed")
        for _ in range(8):
            world.manager.failed(2, step)
        world.manager.failed(2, GptloopError("and another one"))
        world.manager.failed(3, GptloopError("of another version"))
        assert (await status(world, 2)).state is State.SERVING
        world.manager.failed(2, GptloopError("no finite numbers"))
        await world.serves(3)
        two = await status(world, 2)
        assert two.state is State.REFUSED
        assert two.reason == "failing: 3 failures within 60 s, at last: no finite numbers"
        assert world.value("refused_versions_total", reason="failing") == 1


@async_test
async def test_if_the_next_version_fails_too_neither_is_refused(world: World) -> None:
    """The device may have failed. Otherwise one good version after the other would be refused."""

    def fail(number: int) -> None:
        for _ in range(3):
            world.manager.failed(number, GptloopError("the device is gone"))

    async with world.running(2):
        fail(2)
        await world.serves(3)
        fail(3)
        states = [(await status(world, number)).state for number in (2, 3)]
        assert State.REFUSED not in states
        await world.serves(2)
        fail(2)
        assert (await status(world, 2)).state is State.SERVING
