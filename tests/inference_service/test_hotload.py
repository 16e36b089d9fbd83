"""Following the registry with a real engine and tiny versions."""

import asyncio
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

from inference_service import gate, residents
from shared.errors import FailedPrecondition, NotFound, Unavailable
from shared.registry.store import Registry
from tests.fakes import publish_tiny_version
from tests.inference_service.world import LIMIT_S, World, polls, run, served, until


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "registry")


def test_the_best_version_serves_as_it_changes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        with pytest.raises(Unavailable):
            async with world.loader.stream(None):
                pass
        publish_tiny_version(world.registry, 2.0)
        await until(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 3.0)
        publish_tiny_version(world.registry, 1.0)
        await until(lambda: world.serving == 3)
        await until(lambda: world.resident() == {"3"})
        assert served(caplog) == [1, 3]
        assert world.value("swaps_total") == 1

    run(world, test)


def test_a_version_stays_until_its_last_stream_ends_and_a_newer_one_waits(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def test() -> None:
        publish_tiny_version(world.registry, 5.0)
        await until(lambda: world.serving == 1)
        async with world.loader.stream(None) as first:
            assert first.manifest.version == 1
            publish_tiny_version(world.registry, 4.0)
            await until(lambda: world.serving == 2)
            async with world.loader.stream(None):
                publish_tiny_version(world.registry, 3.0)
                await polls(world)
                publish_tiny_version(world.registry, 2.0)
                await polls(world)
                assert world.resident() == {"1", "2"}
        await until(lambda: world.serving == 4)
        await until(lambda: world.resident() == {"4"})
        assert served(caplog) == [1, 2, 4]

    run(world, test)


def test_an_older_version_is_loaded_for_those_who_name_it(world: World) -> None:
    old = publish_tiny_version(world.registry, 5.0)
    publish_tiny_version(world.registry, 1.0)

    async def test() -> None:
        await until(lambda: world.serving == 2)

        async def use() -> int:
            async with world.loader.stream(old) as resident:
                assert "1" in world.resident()
                return resident.manifest.version

        assert await asyncio.gather(*(use() for _ in range(3))) == [1, 1, 1]
        await until(lambda: world.resident() == {"2"})
        assert world.serving == 2

    run(world, test)


def test_a_named_version_waits_for_room(world: World) -> None:
    one, two = (publish_tiny_version(world.registry, 5.0) for _ in range(2))
    publish_tiny_version(world.registry, 1.0)

    async def test() -> None:
        await until(lambda: world.serving == 3)
        async with world.loader.stream(one):
            waiting = asyncio.create_task(world.loader.stream(two).__aenter__())
            cancelled = asyncio.create_task(world.loader.stream(two).__aenter__())
            await polls(world)
            assert not waiting.done()
            cancelled.cancel()
        assert (await waiting).manifest.version == 2

    run(world, test)


def empty_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{}")


def corrupt(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_changed_file_is_refused_once_and_the_version_before_stays(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        publish_tiny_version(world.registry, 2.0)
        await until(lambda: world.serving == 1)
        # Before the loader can see it.
        staged = Registry(world.registry.root.parent / "staged")
        publish_tiny_version(staged, 9.0)
        bad = publish_tiny_version(staged, 1.0)
        corrupt(staged.version_directory(2))
        staged.version_directory(2).rename(world.registry.version_directory(2))
        await until(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        await polls(world)
        assert world.serving == 1
        with pytest.raises(FailedPrecondition, match=r"Version 2 cannot serve: .* SHA-256"):
            async with world.loader.stream(bad):
                pass
        publish_tiny_version(world.registry, 1.5)
        await until(lambda: world.serving == 3)
        assert world.value("refused_versions_total", reason="corrupt") == 1

    run(world, test)
    assert sum("is refused" in record.getMessage() for record in caplog.records) == 1


def test_the_next_best_version_serves_where_the_best_is_unfit_at_the_start(world: World) -> None:
    publish_tiny_version(world.registry, 3.0)
    publish_tiny_version(world.registry, 2.0)
    unfit = publish_tiny_version(world.registry, 1.0, change=empty_tokenizer)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        assert world.value("refused_versions_total", reason="unfit") == 1
        with pytest.raises(FailedPrecondition, match="Version 3 cannot serve"):
            async with world.loader.stream(unfit):
                pass

    run(world, test)


def test_a_version_that_disappears_is_no_refusal(world: World) -> None:
    publish_tiny_version(world.registry, 1.0)
    gone = publish_tiny_version(world.registry, 2.0)
    world.registry.remove_version(2)

    async def test() -> None:
        await until(lambda: world.serving == 1)
        with pytest.raises(NotFound, match="was removed"):
            async with world.loader.stream(gone):
                pass
        assert world.value("refused_versions_total", reason="corrupt") == 0

    run(world, test)


def test_a_caller_that_leaves_during_the_load_keeps_nothing_in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish_tiny_version(world.registry, 5.0)
    publish_tiny_version(world.registry, 1.0)
    entered, go_on = threading.Event(), threading.Event()
    load = gate.read_content

    def slow(*arguments: Any) -> Any:
        if arguments[1] == old:
            entered.set()
            assert go_on.wait(LIMIT_S)
        return load(*arguments)

    monkeypatch.setattr(residents, "read_content", slow)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        waiting = asyncio.create_task(world.loader.stream(old).__aenter__())
        await until(entered.is_set)
        waiting.cancel()
        go_on.set()
        await asyncio.wait([waiting])
        await polls(world)
        await until(lambda: world.resident() == {"2"})

    run(world, test)


def test_a_caller_that_leaves_as_the_load_ends_keeps_nothing_in_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = publish_tiny_version(world.registry, 5.0)
    publish_tiny_version(world.registry, 1.0)

    async def test() -> None:
        await until(lambda: world.serving == 2)
        waiting = asyncio.create_task(world.loader.stream(old).__aenter__())
        report = world.metrics.resident

        def cancel_and_report(*arguments: Any) -> None:
            # The version is handed over, and its caller has not had a turn since.
            waiting.cancel()
            report(*arguments)

        monkeypatch.setattr(world.metrics, "resident", cancel_and_report)
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await until(lambda: world.resident() == {"2"})

    run(world, test)
