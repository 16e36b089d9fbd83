"""Writes that a client reads in time, or does not."""

import asyncio

import pytest

from inference_service.pauses import Pauses
from inference_service.write_timeouts import WriteTimeouts
from shared.errors import ResourceExhausted
from tests.asynchronous import async_test


class Reader:
    """A client that reads a message once `ready` is set, with a clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ready = asyncio.Event()
        self._pauses = Pauses(lambda: self.now_s)
        self._write_timeouts = WriteTimeouts(10.0, self._pauses, lambda: self.now_s)

    async def start_write(self) -> "asyncio.Task[None]":
        """Starts to write a message that waits for the client."""
        write = asyncio.create_task(self._write())
        await asyncio.sleep(0)
        return write

    async def run_for(self, seconds: float) -> None:
        """Moves the clock while the process runs and checks its writes."""
        for _ in range(round(seconds * 2)):
            self.now_s += 0.5
            self._write_timeouts.check()
            await asyncio.sleep(0)

    async def _write(self) -> None:
        async with self._write_timeouts.limit():
            await self.ready.wait()


@async_test
async def test_an_unread_message_ends_its_stream() -> None:
    reader = Reader()
    write = await reader.start_write()
    await reader.run_for(10.0)
    assert not write.done()
    await reader.run_for(0.5)
    with pytest.raises(ResourceExhausted, match="has not read a message for 10 s"):
        await write


@async_test
async def test_a_message_read_in_time_does_not_count_later() -> None:
    reader = Reader()
    write = await reader.start_write()
    await reader.run_for(9.5)
    reader.ready.set()
    await write
    await reader.run_for(30.0)


@async_test
async def test_a_pause_of_the_process_does_not_count() -> None:
    reader = Reader()
    write = await reader.start_write()
    await reader.run_for(5.0)
    reader.now_s += 3600.0
    await reader.run_for(4.0)
    reader.ready.set()
    await write


@async_test
async def test_a_cancelled_write_raises_cancelled_error() -> None:
    reader = Reader()
    write = await reader.start_write()
    write.cancel()
    with pytest.raises(asyncio.CancelledError):
        await write
    await reader.run_for(30.0)
