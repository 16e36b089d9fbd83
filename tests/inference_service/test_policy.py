"""What operators decide, and what streams bring about: labels, pins, rollbacks, versions that are held."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from inference_service import gate, residents
from inference_service.hotload import Standing, State
from shared.errors import FailedPrecondition, GptloopError, InvalidArgument, NotFound
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import BAD_SEED
from tests.inference_service.world import LIMIT_S, World, polls, run, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    """With three versions, of which the second one is the best."""
    world = World(tmp_path / "registry")
    for bits_per_byte in (3.0, 1.0, 2.0):
        publish_tiny_version(world.registry, bits_per_byte)
    return world


async def standing(world: World, number: int) -> Standing:
    return (await world.loader.standings())[number - 1]


def test_a_pin_holds_against_whatever_is_published_until_a_label_is_followed_again(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.let_serve("pinned:1")
        await until(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 0.5)
        await polls(world)
        assert world.serving == 1
        assert (await standing(world, 1)).labels == ("pinned:1",)
        await world.loader.let_serve("latest")
        await until(lambda: world.serving == 4)
        await world.loader.let_serve("best")
        await polls(world)
        assert world.serving == 4

    run(world, test)


def test_the_policy_is_kept_over_a_restart(world: World) -> None:
    async def pin() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.let_serve("pinned:1")
        await until(lambda: world.serving == 1)

    run(world, pin)
    restarted = World(world.registry.root)

    async def test() -> None:
        await until(lambda: restarted.serving is not None)
        assert restarted.serving == 1

    run(restarted, test)


def test_the_stable_version_is_the_promoted_one(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        with pytest.raises(FailedPrecondition, match="No version is stable yet"):
            await world.loader.let_serve("stable")
        await world.loader.promote(3)
        assert world.serving == 2
        manifest = await world.catalogue.resolve("stable")
        assert manifest is not None and manifest.version == 3
        await world.loader.let_serve("stable")
        await until(lambda: world.serving == 3)
        await world.loader.promote(1)
        await until(lambda: world.serving == 1)

    run(world, test)


def test_what_does_not_exist_or_was_refused_cannot_be_chosen(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.roll_back()
        with pytest.raises(InvalidArgument, match="is no label"):
            await world.loader.let_serve("newest")
        for label, kind in (("pinned:9", NotFound), ("pinned:2", FailedPrecondition)):
            with pytest.raises(kind):
                await world.loader.let_serve(label)
        with pytest.raises(NotFound):
            await world.loader.promote(9)
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            await world.loader.promote(2)
        assert world.catalogue.policy == "best"

    run(world, test)


def test_a_rollback_goes_to_the_next_version_of_the_policy_and_stays(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        assert await world.loader.roll_back() == 3
        await until(lambda: world.serving == 3)
        await polls(world)
        assert world.serving == 3
        two = await standing(world, 2)
        assert (two.state, two.reason) == (State.REFUSED, "rolled_back: an operator rolled it back")
        assert (await standing(world, 3)).labels == ("best", "latest")
        # A better one takes over as ever.
        publish_tiny_version(world.registry, 0.5)
        await until(lambda: world.serving == 4)

    run(world, test)


def test_a_rollback_to_a_version_in_memory_takes_no_time(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        async with world.loader.stream(None) as old:
            publish_tiny_version(world.registry, 0.5)
            await until(lambda: world.serving == 4)
            begin = time.monotonic()
            assert await world.loader.roll_back() == 2
            assert world.serving == 2 and world.loader.serving is old
            assert time.monotonic() - begin < 1.0

    run(world, test)


def test_a_rollback_does_not_wait_for_room(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        async with world.loader.stream(None):
            publish_tiny_version(world.registry, 0.5)
            await until(lambda: world.serving == 4)
            async with world.loader.stream(None):
                assert await world.loader.roll_back(1) == 1
                await until(lambda: world.serving == 1)
                assert world.resident() == {"1", "2", "4"}
                assert world.catalogue.policy == "pinned:1"
        await until(lambda: world.resident() == {"1"})

    run(world, test)


def test_the_only_version_cannot_be_rolled_back(tmp_path: Path) -> None:
    world = World(tmp_path / "registry")

    async def test() -> None:
        with pytest.raises(FailedPrecondition, match="No version serves"):
            await world.loader.roll_back()
        publish_tiny_version(world.registry, 1.0)
        await until(lambda: world.serving == 1)
        with pytest.raises(FailedPrecondition, match="no other version"):
            await world.loader.roll_back()
        with pytest.raises(FailedPrecondition, match="serves already"):
            await world.loader.roll_back(1)
        for _ in range(10):
            world.loader.failed(1, GptloopError("no"))
        assert (world.serving, (await standing(world, 1)).state) == (1, State.SERVING)

    run(world, test)


def test_a_version_whose_streams_keep_failing_is_rolled_back_by_itself(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        step = GptloopError("a step of eight streams failed")
        for _ in range(8):
            world.loader.failed(2, step)
        world.loader.failed(2, GptloopError("and another one"))
        world.loader.failed(3, GptloopError("of another version"))
        assert (await standing(world, 2)).state is State.SERVING
        world.loader.failed(2, GptloopError("no finite numbers"))
        await until(lambda: world.serving == 3)
        two = await standing(world, 2)
        assert two.state is State.REFUSED
        assert two.reason == "failing: 3 failures within 60 s, at last: no finite numbers"
        assert world.value("refused_versions_total", reason="failing") == 1

    run(world, test)


def test_a_loaded_version_stays_until_it_is_unloaded(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.load(1)
        await polls(world)
        one = await standing(world, 1)
        assert (one.state, one.held, one.streams) == (State.RESIDENT, True, 0)
        assert one.memory_bytes > 4 * one.manifest.parameters
        async with world.loader.stream(one.manifest):
            await world.loader.unload(1)
            assert (await standing(world, 1)).streams == 1
        await until(lambda: world.resident() == {"2"})
        assert (await standing(world, 1)).state is State.AVAILABLE
        with pytest.raises(FailedPrecondition, match="not in memory"):
            await world.loader.unload(1)
        with pytest.raises(FailedPrecondition, match="serves"):
            await world.loader.unload(2)

    run(world, test)


def test_what_is_held_makes_room_for_the_version_that_is_to_serve(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.load(1)
        publish_tiny_version(world.registry, 0.5)
        await until(lambda: world.serving == 4)
        await until(lambda: world.resident() == {"4"})

    run(world, test)


def test_requests_that_name_an_older_version_cannot_keep_the_best_one_out(world: World) -> None:
    one = world.registry.version(1)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        async with world.loader.stream(one):
            publish_tiny_version(world.registry, 0.5)
            await polls(world)
            assert (await standing(world, 4)).state is State.WAITING
            # It would keep version 1 in memory for ever.
            late = asyncio.create_task(world.loader.stream(one).__aenter__())
            await polls(world)
            assert not late.done()
        await until(lambda: world.serving == 4)
        assert (await late).manifest == one

    run(world, test)


def test_another_registry_in_the_same_place_begins_anew(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        moved = world.registry.root.with_name("moved")
        world.registry.root.rename(moved)
        await polls(world)
        assert world.serving == 2
        for _ in range(2):
            publish_tiny_version(world.registry, 9.0, seed=3)
        new = world.registry.version(2)
        await until(lambda: world.loader.serving is not None and world.loader.serving.manifest == new)

    run(world, test)


def test_a_pinned_label_never_means_another_version(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.let_serve("pinned:1")
        await until(lambda: world.serving == 1)
        await world.loader.roll_back()
        await until(lambda: world.serving != 1)
        assert world.catalogue.policy == "pinned:1"
        manifest = await world.catalogue.resolve("pinned:1")
        assert manifest is not None and manifest.version == 1

    run(world, test)


def test_a_rolled_back_version_that_is_still_in_memory_has_another_chance(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        async with world.loader.stream(None):
            await world.loader.load(2)
            await world.loader.roll_back()
            await until(lambda: world.serving == 3)
            two = await standing(world, 2)
            assert (two.state, two.held, two.streams) == (State.REFUSED, False, 1)
            await world.loader.load(2)
            await until(lambda: world.serving == 2)

    run(world, test)


def test_a_held_version_goes_only_where_its_room_is_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.residents._limit = 3
    entered, go_on = threading.Event(), threading.Event()
    read = gate.read_content

    def slow(*arguments: Any) -> Any:
        if arguments[1].version == 4:
            entered.set()
            assert go_on.wait(LIMIT_S)
        return read(*arguments)

    monkeypatch.setattr(residents, "read_content", slow)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.load(1)
        publish_tiny_version(world.registry, 0.5)
        await until(entered.is_set)
        await polls(world)
        assert (await standing(world, 1)).held
        go_on.set()
        await until(lambda: world.serving == 4)
        assert (await standing(world, 1)).held

    run(world, test)


def test_what_is_in_memory_is_listed_also_when_it_was_removed(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        for number in (1, 2, 3):
            world.registry.remove_version(number)
        (two,) = await world.loader.standings()
        assert (two.manifest.version, two.state) == (2, State.SERVING)
        with pytest.raises(NotFound):
            await world.loader.unload(1)

    run(world, test)


def test_a_rollback_refuses_what_served_when_it_was_asked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the pin lets the other version serve before the refusal is noted."""

    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.load(1)
        look = world.catalogue.look

        async def look_and_follow() -> None:
            await look()
            world.loader.follow()

        monkeypatch.setattr(world.catalogue, "look", look_and_follow)
        assert await world.loader.roll_back(1) == 1
        assert world.serving == 1
        assert (await standing(world, 2)).state is State.REFUSED

    run(world, test)


def test_a_version_that_is_ready_serves_while_a_better_one_is_on_its_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or versions that come faster than they are examined would never serve."""
    entered, go_on = threading.Event(), threading.Event()
    read = gate.read_content

    def slow(*arguments: Any) -> Any:
        if arguments[1].version == 4:
            entered.set()
            assert go_on.wait(LIMIT_S)
        return read(*arguments)

    monkeypatch.setattr(residents, "read_content", slow)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        publish_tiny_version(world.registry, 0.5)
        await until(entered.is_set)
        publish_tiny_version(world.registry, 0.4)
        await polls(world)
        entered.clear()
        go_on.set()
        await until(lambda: world.serving == 5)

    run(world, test)
    assert world.value("swaps_total") == 2


def test_a_worse_version_that_an_operator_loads_can_be_pinned(world: World) -> None:
    async def test() -> None:
        await until(lambda: world.serving == 2)
        publish_tiny_version(world.registry, 0.5, seed=BAD_SEED)
        await until(lambda: world.value("refused_versions_total", reason="worse") == 1)
        await world.loader.load(4)
        await polls(world)
        assert (world.serving, (await standing(world, 4)).state) == (2, State.RESIDENT)
        await world.loader.let_serve("pinned:4")
        await until(lambda: world.serving == 4)

    run(world, test)


def test_what_is_held_and_unused_keeps_nobody_waiting(world: World) -> None:
    one = world.registry.version(1)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        await world.loader.load(3)
        async with world.loader.stream(one):
            assert world.resident() == {"1", "2"}

    run(world, test)


def test_requests_for_one_version_do_not_keep_those_for_another_one_waiting_for_ever(world: World) -> None:
    one, three = world.registry.version(1), world.registry.version(3)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        first = world.loader.stream(one)
        await first.__aenter__()
        other = asyncio.create_task(world.loader.stream(three).__aenter__())
        await polls(world)
        late = asyncio.create_task(world.loader.stream(one).__aenter__())
        await polls(world)
        assert not other.done() and not late.done()
        await first.__aexit__(None, None, None)
        assert (await other).manifest == three

    run(world, test)


def test_the_server_can_end_in_the_middle_of_an_examination(tmp_path: Path) -> None:
    world = World(tmp_path / "registry")
    publish_tiny_version(world.registry, 1.0, windows=(2000, 90))

    async def test() -> None:
        await until(lambda: bool(world.engine._arriving))

    run(world, test)
    assert world.serving is None
