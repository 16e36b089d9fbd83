"""Writes that a client takes, or does not."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from inference_service.patience import Patience
from inference_service.pauses import Pauses
from shared.errors import ResourceExhausted


class Reader:
    """A client that takes a message once `ready` is set, and a clock that tests move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ready = asyncio.Event()
        self._pauses = Pauses(lambda: self.now_s)
        self.patience = Patience(10.0, self._pauses, lambda: self.now_s)

    async def write(self) -> None:
        async with self.patience.with_reader():
            await self.ready.wait()

    async def run_for(self, seconds: float) -> None:
        """Lets time pass in which the process runs and looks."""
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            self.patience.look()
            await asyncio.sleep(0)


def run(test: Callable[[Reader], Coroutine[Any, Any, None]]) -> None:
    async def body() -> None:
        await test(Reader())

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_message_that_is_not_taken_ends_its_stream() -> None:
    async def test(reader: Reader) -> None:
        write = asyncio.create_task(reader.write())
        await asyncio.sleep(0)
        await reader.run_for(10.0)
        assert not write.done()
        await reader.run_for(0.5)
        with pytest.raises(ResourceExhausted, match="has not read a message for 10 s"):
            await write

    run(test)


def test_a_message_that_is_taken_in_time_is_forgotten() -> None:
    async def test(reader: Reader) -> None:
        write = asyncio.create_task(reader.write())
        await asyncio.sleep(0)
        await reader.run_for(9.5)
        reader.ready.set()
        await write
        await reader.run_for(30.0)

    run(test)


def test_a_pause_of_the_process_is_not_the_fault_of_the_client() -> None:
    async def test(reader: Reader) -> None:
        write = asyncio.create_task(reader.write())
        await asyncio.sleep(0)
        await reader.run_for(5.0)
        reader.now_s += 3600.0
        await reader.run_for(4.0)
        reader.ready.set()
        await write

    run(test)


def test_who_cancels_a_write_gets_what_it_asked_for() -> None:
    async def test(reader: Reader) -> None:
        write = asyncio.create_task(reader.write())
        await asyncio.sleep(0)
        write.cancel()
        with pytest.raises(asyncio.CancelledError):
            await write
        await reader.run_for(30.0)

    run(test)
