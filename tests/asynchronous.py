"""Lets a test be a coroutine function."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

from tests.waiting import HANG_S

Parameters = ParamSpec("Parameters")


def async_test(test: Callable[Parameters, Awaitable[None]]) -> Callable[Parameters, None]:
    """Runs a test on an event loop of its own, with the fixtures that it names; fails if it hangs."""

    @functools.wraps(test)
    def run(*arguments: Parameters.args, **fixtures: Parameters.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*arguments, **fixtures), HANG_S))

    return run
