"""Versions that served and must not any more: operators roll them back, or failing streams do."""

import asyncio
from pathlib import Path

import pytest

from inference_service.versions.planner import State
from shared.errors import FailedPrecondition, GptloopError
from shared.registry.store import Registry
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import flip_a_bit
from tests.inference_service.world import World, hold_read, polls, run, status
from tests.waiting import eventually


def test_a_rollback_goes_to_the_next_version_of_the_policy_and_stays(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        assert await world.manager.roll_back() == 3
        await eventually(lambda: world.serving == 3)
        await polls(world)
        assert world.serving == 3
        two = await status(world, 2)
        assert (two.state, two.reason) == (State.REFUSED, "rolled_back: an operator rolled it back")
        assert (await status(world, 3)).labels == ("best", "latest")
        # A better one takes over as ever.
        publish_tiny_version(world.registry, 0.5)
        await eventually(lambda: world.serving == 4)

    run(world, test)


def test_a_rollback_to_a_version_in_memory_takes_no_time(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(None) as old:
            publish_tiny_version(world.registry, 0.5)
            await eventually(lambda: world.serving == 4)
            assert await world.manager.roll_back() == 2
            assert world.serving == 2 and world.manager.serving is old

    run(world, test)


def test_a_rollback_does_not_wait_for_room(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(None):
            publish_tiny_version(world.registry, 0.5)
            await eventually(lambda: world.serving == 4)
            async with world.residents.stream(None):
                assert await world.manager.roll_back(1) == 1
                assert world.serving == 1
                assert world.resident() == {"1", "2", "4"}
                assert world.catalogue.policy == "pinned:1"
        # Version 4 is refused, version 2 has room.
        await eventually(lambda: world.resident() == {"1", "2"})

    run(world, test)


def in_the_way(world: World) -> Path:
    """Makes the folder of decisions one that cannot be written, whoever runs the test."""
    folder = world.registry.root / "serving"
    folder.rename(world.registry.root / "kept")
    folder.write_text("in the way")
    return folder


@pytest.mark.parametrize("number", [None, 1])
def test_a_rollback_that_cannot_be_written_fails_and_changes_nothing(world: World, number: int | None) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await eventually(lambda: bool(world.registry.decisions.findings()))
        in_the_way(world)
        with pytest.raises(FailedPrecondition, match="cannot be written"):
            await world.manager.roll_back(number)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")
        assert (await status(world, 2)).state is State.SERVING
        assert world.value("refused_versions_total", reason="rolled_back") == 0

    run(world, test)


@pytest.mark.parametrize("what", ["best", "latest", "stable", "pinned:1", "run:tiny"])
def test_a_policy_that_cannot_be_written_is_not_acted_on(world: World, what: str) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await world.manager.promote(3)
        in_the_way(world)
        with pytest.raises(FailedPrecondition):
            await world.manager.set_policy(what)
        with pytest.raises(FailedPrecondition):
            await world.manager.promote(1)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")

    run(world, test)


def test_a_rollback_is_in_the_registry_when_it_returns(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await world.manager.roll_back(1)
        reader = Registry(world.registry.root)
        assert reader.decisions.policy() == "pinned:1"
        assert [each.refusal for each in reader.decisions.findings()[2]] == ["rolled_back"]

    run(world, test)


def test_a_rollback_onto_a_damaged_version_says_so_and_the_one_before_serves_on(world: World) -> None:
    flip_a_bit(world.registry.version_directory(1))

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        with pytest.raises(FailedPrecondition, match=r"Version 1 cannot serve: .*SHA-256"):
            await world.manager.roll_back(1)
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")
        assert (await status(world, 2)).state is State.SERVING
        assert world.resident() == {"2"}

    run(world, test)
    restarted = World(world.registry.root)

    async def again() -> None:
        await eventually(lambda: restarted.serving == 2)

    run(restarted, again)


def test_a_rollback_takes_the_next_version_that_can_be_loaded(world: World) -> None:
    flip_a_bit(world.registry.version_directory(3))

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        assert await world.manager.roll_back() == 1
        assert world.serving == 1
        with pytest.raises(FailedPrecondition, match="no other version than 1 that could serve, so it serves on"):
            await world.manager.roll_back()
        assert world.serving == 1

    run(world, test)


def test_the_one_before_serves_until_its_successor_is_loaded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = hold_read(monkeypatch, 1)

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        rolling = asyncio.create_task(world.manager.roll_back(1))
        await eventually(reading.entered.is_set)
        async with world.residents.stream(None) as resident:
            assert resident.manifest.version == 2
        assert world.catalogue.policy == "best"
        reading.go_on.set()
        assert await rolling == 1
        assert world.serving == 1

    run(world, test)


def test_a_rollback_that_nobody_waits_for_any_more_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hold_read(monkeypatch, 1)

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        rolling = asyncio.create_task(world.manager.roll_back(1))
        await eventually(reading.entered.is_set)
        rolling.cancel()
        reading.go_on.set()
        await asyncio.wait([rolling])
        await polls(world)
        assert (world.serving, world.catalogue.policy) == (2, "best")

    run(world, test)


def test_the_same_rollback_twice_at_once_takes_one_version_away(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await asyncio.gather(world.manager.roll_back(1), world.manager.roll_back(1))
        assert world.serving == 1
        assert (await status(world, 1)).state is State.SERVING

    run(world, test)


def test_a_rollback_refuses_what_served_when_it_was_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the pin lets the other version serve before the refusal is noted."""

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await world.manager.load(1)
        look = world.catalogue.look

        async def look_and_follow() -> None:
            await look()
            world.manager.replan()

        monkeypatch.setattr(world.catalogue, "look", look_and_follow)
        assert await world.manager.roll_back(1) == 1
        assert world.serving == 1
        assert (await status(world, 2)).state is State.REFUSED

    run(world, test)


def test_the_only_version_cannot_be_rolled_back(tmp_path: Path) -> None:
    world = World(tmp_path / "registry")

    async def test() -> None:
        with pytest.raises(FailedPrecondition, match="No version serves"):
            await world.manager.roll_back()
        publish_tiny_version(world.registry, 1.0)
        await eventually(lambda: world.serving == 1)
        with pytest.raises(FailedPrecondition, match="no other version"):
            await world.manager.roll_back()
        with pytest.raises(FailedPrecondition, match="serves already"):
            await world.manager.roll_back(1)
        for _ in range(10):
            world.manager.failed(1, GptloopError("no"))
        assert (world.serving, (await status(world, 1)).state) == (1, State.SERVING)

    run(world, test)


def test_a_pinned_label_never_means_another_version(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        await world.manager.set_policy("pinned:1")
        await eventually(lambda: world.serving == 1)
        await world.manager.roll_back()
        await eventually(lambda: world.serving != 1)
        assert world.catalogue.policy == "pinned:1"
        manifest = await world.catalogue.resolve("pinned:1")
        assert manifest is not None and manifest.version == 1

    run(world, test)


def test_a_rolled_back_version_that_is_still_in_memory_has_another_chance(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(None):
            await world.manager.load(2)
            await world.manager.roll_back()
            await eventually(lambda: world.serving == 3)
            two = await status(world, 2)
            assert (two.state, two.held, two.streams) == (State.REFUSED, False, 1)
            await world.manager.load(2)
            await eventually(lambda: world.serving == 2)

    run(world, test)


def test_a_version_whose_streams_keep_failing_is_rolled_back_by_itself(world: World) -> None:
    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        step = GptloopError("a step of eight streams failed")
        for _ in range(8):
            world.manager.failed(2, step)
        world.manager.failed(2, GptloopError("and another one"))
        world.manager.failed(3, GptloopError("of another version"))
        assert (await status(world, 2)).state is State.SERVING
        world.manager.failed(2, GptloopError("no finite numbers"))
        await eventually(lambda: world.serving == 3)
        two = await status(world, 2)
        assert two.state is State.REFUSED
        assert two.reason == "failing: 3 failures within 60 s, at last: no finite numbers"
        assert world.value("refused_versions_total", reason="failing") == 1

    run(world, test)


def test_where_the_next_version_fails_alike_the_versions_are_not_to_blame(world: World) -> None:
    """As where the device fails: otherwise one good version after the other would be refused for good."""

    def fail(number: int) -> None:
        for _ in range(3):
            world.manager.failed(number, GptloopError("the device is gone"))

    async def test() -> None:
        await eventually(lambda: world.serving == 2)
        fail(2)
        await eventually(lambda: world.serving == 3)
        fail(3)
        states = [(await status(world, number)).state for number in (2, 3)]
        assert State.REFUSED not in states
        await eventually(lambda: world.serving == 2)
        fail(2)
        assert (await status(world, 2)).state is State.SERVING

    run(world, test)
