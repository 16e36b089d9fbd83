"""Limits how long a client may leave a message unread."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from inference_service.pauses import Pauses
from shared.errors import ResourceExhausted


class WriteTimeouts:
    """Ends writes that a client does not read within `limit_s`, not counting pauses of the process.

    Belongs to the event loop.
    """

    def __init__(self, limit_s: float, pauses: Pauses, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._pauses = pauses
        self._clock = clock
        # When each write began.
        self._writes: dict[asyncio.Timeout, float] = {}

    @asynccontextmanager
    async def limit(self) -> AsyncIterator[None]:
        """Encloses one write; raises `ResourceExhausted` if it takes too long."""
        try:
            async with asyncio.timeout(None) as timeout:
                self._writes[timeout] = self._clock()
                try:
                    yield
                finally:
                    self._writes.pop(timeout, None)
        except TimeoutError:
            raise ResourceExhausted(
                f"The client has not read a message for {self._limit_s:g} s, so its stream has ended."
            ) from None

    def check(self) -> None:
        """Ends the writes that have taken too long."""
        for timeout, began in list(self._writes.items()):
            if self._pauses.ran_since(began) > self._limit_s:
                del self._writes[timeout]
                timeout.reschedule(asyncio.get_running_loop().time())
