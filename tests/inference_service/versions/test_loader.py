"""The thread that reads versions."""

import threading

import mlx.core as mx
import pytest

from tests.asynchronous import async_test
from tests.inference_service.world import World
from tests.waiting import eventually


@async_test
async def test_the_thread_that_reads_versions_clears_its_streams_before_it_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise a process that ends at the same time may abort.
    clear_streams = mx.clear_streams
    cleared: list[str] = []

    def clear() -> None:
        clear_streams()
        cleared.append(threading.current_thread().name)

    monkeypatch.setattr(mx, "clear_streams", clear)
    async with world.running():
        await eventually(lambda: world.serving == 2)
    await eventually(lambda: {"engine", "loader_0"} <= set(cleared))
