"""Keeps health true: SERVING only while a version serves and the engine makes progress."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from inference_service.engine.engine import Engine
from inference_service.pauses import LOOK_INTERVAL_S, Pauses
from inference_service.write_timeouts import WriteTimeouts

logger = logging.getLogger(__name__)

# A step that takes longer turns health to NOT_SERVING, within a second of its beginning, until it ends.
_SLOW_S = 0.7
# A part of an examination may take this long: on a GPU it compiles a program the first time.
_EXAMINED_WITHIN_S = 600.0


class Watchdog:
    """Watches one engine, and the clients that read from it. `serves` returns whether a version serves, `set_serving`
    changes health. A pause of the whole process counts for no step."""

    def __init__(
        self,
        engine: Engine,
        serves: Callable[[], bool],
        set_serving: Callable[[bool], Awaitable[None]],
        stuck_after_s: float,
        pauses: Pauses,
        write_timeouts: WriteTimeouts,
    ) -> None:
        self._engine = engine
        self._serves = serves
        self._set_serving = set_serving
        self._stuck_after_s = stuck_after_s
        self._pauses = pauses
        self._write_timeouts = write_timeouts

    async def run(self) -> None:
        """Returns when a step is stuck: it takes so long that it will not end."""
        healthy = False
        while True:
            self._pauses.look()
            self._write_timeouts.check()
            serves, busy_since = self._serves(), self._engine.busy_since
            stalled_s = 0.0 if busy_since is None else self._pauses.ran_since(busy_since)
            limit_s = max(self._stuck_after_s, _EXAMINED_WITHIN_S) if self._engine.examines else self._stuck_after_s
            if stalled_s > limit_s:
                logger.error("the engine is stuck: a step has taken %.1f s", stalled_s)
                return
            if (serves and stalled_s < _SLOW_S) != healthy:
                healthy = not healthy
                await self._set_serving(healthy)
                if healthy:
                    logger.info("health is SERVING")
                else:
                    logger.warning("health is NOT_SERVING: %s", "a step takes long" if serves else "no version serves")
            await asyncio.sleep(LOOK_INTERVAL_S)
