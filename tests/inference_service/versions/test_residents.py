"""The versions in memory: which are held, which have room, and which calls wait."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from inference_service.versions.planner import State
from shared.errors import FailedPrecondition, NotFound, ResourceExhausted
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.world import World, hold_read, polls, served, status
from tests.waiting import eventually


@async_test
async def test_a_version_stays_until_its_last_stream_ends_and_a_newer_one_waits(
    fresh: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async with fresh.running():
        publish_tiny_version(fresh.registry, 5.0)
        await eventually(lambda: fresh.serving == 1)
        async with fresh.residents.stream(None) as first:
            assert first.manifest.version == 1
            publish_tiny_version(fresh.registry, 4.0)
            await eventually(lambda: fresh.serving == 2)
            async with fresh.residents.stream(None):
                publish_tiny_version(fresh.registry, 3.0)
                await polls(fresh)
                publish_tiny_version(fresh.registry, 2.0)
                await polls(fresh)
                assert fresh.resident() == {"1", "2"}
        await eventually(lambda: fresh.serving == 4)
        assert served(caplog) == [1, 2, 4]


@async_test
async def test_an_older_version_is_loaded_for_calls_that_name_it(fresh: World) -> None:
    old = publish_tiny_version(fresh.registry, 5.0)
    publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)

        async def use() -> int:
            async with fresh.residents.stream(old) as resident:
                assert "1" in fresh.resident()
                return resident.manifest.version

        assert await asyncio.gather(*(use() for _ in range(3))) == [1, 1, 1]
        assert fresh.serving == 2


@async_test
async def test_a_named_version_waits_for_room(fresh: World) -> None:
    one, two = (publish_tiny_version(fresh.registry, 5.0) for _ in range(2))
    publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 3)
        async with fresh.residents.stream(one):
            waiting = asyncio.create_task(fresh.residents.stream(two).__aenter__())
            cancelled = asyncio.create_task(fresh.residents.stream(two).__aenter__())
            await polls(fresh)
            assert not waiting.done()
            cancelled.cancel()
        assert (await waiting).manifest.version == 2


@async_test
async def test_a_loaded_version_stays_until_it_is_unloaded(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.load(1)
        await polls(world)
        one = await status(world, 1)
        assert (one.state, one.held, one.streams) == (State.RESIDENT, True, 0)
        assert one.manifest is not None and one.memory_bytes > one.manifest.parameters
        async with world.residents.stream(one.manifest):
            await world.manager.unload(1)
            assert (await status(world, 1)).streams == 1
        await eventually(lambda: world.resident() == {"2"})
        assert (await status(world, 1)).state is State.AVAILABLE
        with pytest.raises(FailedPrecondition, match="not in memory"):
            await world.manager.unload(1)
        with pytest.raises(FailedPrecondition, match="serves"):
            await world.manager.unload(2)


@async_test
async def test_a_held_version_makes_room_for_one_that_should_serve(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.load(1)
        publish_tiny_version(world.registry, 0.5)
        await eventually(lambda: world.serving == 4)
        await eventually(lambda: "1" not in world.resident())


@async_test
async def test_a_named_version_is_read_once_while_there_is_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    one = world.registry.version(1)
    read: list[int] = []
    verified = world.registry.verified

    def count(manifest: VersionManifest) -> Path:
        read.append(manifest.version)
        return verified(manifest)

    monkeypatch.setattr(world.registry, "verified", count)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        for _ in range(5):
            async with world.residents.stream(one) as resident:
                assert resident.manifest == one
            await polls(world)
        assert read == [2, 1]
        assert world.resident() == {"1", "2"}


@async_test
async def test_the_least_recently_used_version_makes_room_and_a_held_one_goes_last(world: World) -> None:
    world.residents._limit = 4
    publish_tiny_version(world.registry, 4.0)
    manifests = {each.version: each for each in world.registry.versions()}

    async def use(number: int) -> None:
        async with world.residents.stream(manifests[number]):
            pass

    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.load(1)
        await use(3)
        await use(4)
        await use(3)
        await use(1)
        assert world.resident() == {"1", "2", "3", "4"}
        for newest, stay in ((5, {"1", "2", "3", "5"}), (6, {"1", "2", "5", "6"}), (7, {"1", "5", "6", "7"})):
            publish_tiny_version(world.registry, 0.5 / newest)
            await eventually(lambda newest=newest: world.serving == newest)  # type: ignore[misc]
            assert world.resident() == {str(number) for number in stay}


@async_test
async def test_an_idle_version_that_was_removed_or_refused_leaves_memory(world: World) -> None:
    one = world.registry.version(1)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(one):
            pass
        assert world.resident() == {"1", "2"}
        world.registry.remove(Checkpoint(1))
        await eventually(lambda: world.resident() == {"2"})
        await world.manager.roll_back()
        await eventually(lambda: world.resident() == {"3"})


@async_test
async def test_a_held_version_goes_only_if_its_room_is_needed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.residents._limit = 3
    reading = hold_read(monkeypatch, 4)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.load(1)
        publish_tiny_version(world.registry, 0.5)
        await eventually(reading.entered.is_set)
        await polls(world)
        assert (await status(world, 1)).held
        reading.go_on.set()
        await eventually(lambda: world.serving == 4)
        assert (await status(world, 1)).held


@async_test
async def test_a_held_version_without_streams_keeps_no_call_waiting(world: World) -> None:
    one = world.registry.version(1)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.load(3)
        async with world.residents.stream(one):
            assert world.resident() == {"1", "2"}


@async_test
async def test_requests_for_an_older_version_cannot_keep_the_best_one_out(world: World) -> None:
    one = world.registry.version(1)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(one):
            publish_tiny_version(world.registry, 0.5)
            await polls(world)
            assert (await status(world, 4)).state is State.WAITING
            # It would keep version 1 in memory.
            late = asyncio.create_task(world.residents.stream(one).__aenter__())
            await polls(world)
            assert not late.done()
        await eventually(lambda: world.serving == 4)
        assert (await late).manifest == one


@async_test
async def test_requests_for_one_version_do_not_starve_those_for_another(world: World) -> None:
    one, three = world.registry.version(1), world.registry.version(3)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        first = world.residents.stream(one)
        await first.__aenter__()
        other = asyncio.create_task(world.residents.stream(three).__aenter__())
        await polls(world)
        late = asyncio.create_task(world.residents.stream(one).__aenter__())
        await polls(world)
        assert not other.done() and not late.done()
        await first.__aexit__(None, None, None)
        assert (await other).manifest == three


@async_test
async def test_a_version_in_memory_is_listed_even_if_it_was_removed(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        for number in (1, 2, 3):
            world.registry.remove(Checkpoint(number))
        (two,) = await world.manager.statuses()
        assert (two.number, two.state) == (2, State.SERVING)
        with pytest.raises(NotFound):
            await world.manager.unload(1)


@async_test
async def test_a_caller_that_leaves_during_the_load_keeps_nothing_in_memory(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish_tiny_version(fresh.registry, 5.0)
    publish_tiny_version(fresh.registry, 1.0)
    reading = hold_read(monkeypatch, old.version)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)
        waiting = asyncio.create_task(fresh.residents.stream(old).__aenter__())
        await eventually(reading.entered.is_set)
        waiting.cancel()
        reading.go_on.set()
        await asyncio.wait([waiting])
        await eventually(lambda: fresh.resident() == {"1", "2"})
        # Version 1 is in no other's way.
        assert (await status(fresh, 1)).streams == 0
        publish_tiny_version(fresh.registry, 0.5)
        await eventually(lambda: fresh.serving == 3)


@async_test
async def test_a_caller_that_leaves_as_the_load_ends_keeps_nothing_in_memory(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish_tiny_version(fresh.registry, 5.0)
    publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)
        waiting = asyncio.create_task(fresh.residents.stream(old).__aenter__())
        report = fresh.metrics.resident

        def cancel_and_report(*arguments: Any) -> None:
            # The version is handed over, and its caller has not run since.
            waiting.cancel()
            report(*arguments)

        monkeypatch.setattr(fresh.metrics, "resident", cancel_and_report)
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert (await status(fresh, 1)).streams == 0


@async_test
async def test_the_number_of_requests_that_wait_for_versions_is_bounded(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        async with world.residents.stream(None), world.residents.stream(world.registry.version(1)):
            publish_tiny_version(world.registry, 0.5)
            await eventually(lambda: bool(world.residents.without_room))
            manifest = world.registry.version(3)
            waiting = [asyncio.create_task(world.residents.hold(manifest)) for _ in range(16)]
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhausted) as refused:
                async with world.residents.stream(manifest):
                    pass
            assert refused.value.retry_after_s
            # Others are answered meanwhile.
            async with world.residents.stream(None) as serving:
                assert serving.manifest.version == 2
        await eventually(lambda: world.serving == 4)
        await asyncio.gather(*waiting)
