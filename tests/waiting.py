"""Waits for conditions that other threads and processes bring about.

A wait ends when its condition holds, or can no longer hold, however slow the machine is. `HANG_S` only turns a hang
into a failure.
"""

import asyncio
import time
from collections.abc import Callable

HANG_S = 600.0


def wait_until(condition: Callable[[], bool], lost: Callable[[], bool] = lambda: False, hang_s: float = HANG_S) -> None:
    """Returns once the condition holds; fails if `lost` becomes true, for example because a process ended."""
    deadline_s = time.monotonic() + hang_s
    while not condition():
        assert not lost(), "The condition can no longer hold."
        assert time.monotonic() < deadline_s, f"The condition did not hold within {hang_s:.0f} s."
        time.sleep(0.01)


async def eventually(condition: Callable[[], bool]) -> None:
    """Does the same on an event loop."""
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.005)
