"""How long a client may leave a message unread."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from inference_service.pauses import Pauses
from shared.errors import ResourceExhausted


class Patience:
    """Ends writes that a client does not take within `limit_s`, in which the process ran. Belongs to the event loop."""

    def __init__(self, limit_s: float, pauses: Pauses, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._pauses = pauses
        self._clock = clock
        # When each write began.
        self._writes: dict[asyncio.Timeout, float] = {}

    @asynccontextmanager
    async def with_reader(self) -> AsyncIterator[None]:
        """Encloses a write; raises `ResourceExhausted` if the client does not take it."""
        try:
            async with asyncio.timeout(None) as timeout:
                self._writes[timeout] = self._clock()
                try:
                    yield
                finally:
                    self._writes.pop(timeout, None)
        except TimeoutError:
            raise ResourceExhausted(
                f"The client has not read a message for {self._limit_s:g} s, so its stream is ended."
            ) from None

    def look(self) -> None:
        """Ends what has taken too long."""
        for timeout, began in list(self._writes.items()):
            if self._pauses.ran_since(began) > self._limit_s:
                del self._writes[timeout]
                timeout.reschedule(asyncio.get_running_loop().time())
