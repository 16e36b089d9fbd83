"""Waiting for what other threads and processes do.

A wait follows progress, not the clock: it ends when its condition holds, or when that cannot happen any more. A machine
may be as busy as it likes; `HANG_S` only turns a hang into a failure.
"""

import asyncio
import time
from collections.abc import Callable

HANG_S = 600.0


def wait_until(condition: Callable[[], bool], lost: Callable[[], bool] = lambda: False, hang_s: float = HANG_S) -> None:
    """Returns once the condition holds; fails if `lost` says that it never will, as when its process has ended."""
    deadline_s = time.monotonic() + hang_s
    while not condition():
        assert not lost(), "What was waited for cannot happen any more."
        assert time.monotonic() < deadline_s, f"It did not happen within {hang_s:.0f} s."
        time.sleep(0.01)


async def eventually(condition: Callable[[], bool]) -> None:
    """The same on an event loop."""
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.005)
