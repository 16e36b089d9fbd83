"""Time in which this process ran. A container is frozen and a machine is moved without any process being asked."""

import logging
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

# How often somebody looks, and after how long without a look the process was paused.
LOOK_INTERVAL_S = 0.1
_LATE_S = 1.0
# More than there can be while anything is measured.
_REMEMBERED = 64


class Pauses:
    """Notices for how long the process did not run: `look` is called every `LOOK_INTERVAL_S`, or was late.

    An event loop that was blocked looks like a pause, and does the same to what is measured on it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        # When pauses ended, and how long they were.
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def look(self) -> None:
        """Notes a pause if the last look is too long ago."""
        now = self._clock()
        since_s = now - self._looked
        self._looked = now
        if since_s > _LATE_S:
            self._pauses.append((now, since_s - LOOK_INTERVAL_S))
            logger.warning("the process was paused for %.1f s", since_s - LOOK_INTERVAL_S)

    def ran_since(self, moment: float) -> float:
        """For how many seconds the process ran since a time of the clock."""
        self.look()
        paused_s = sum(length_s for ended, length_s in self._pauses if ended > moment)
        return max(0.0, self._clock() - moment - paused_s)
