"""Measures the time in which this process ran: a container can be frozen, or a machine moved, without notice."""

import logging
import time
from collections import deque
from collections.abc import Callable

logger = logging.getLogger(__name__)

# How often `look` must be called, and the gap between two calls that counts as a pause.
LOOK_INTERVAL_S = 0.1
_LATE_S = 1.0
# More pauses than can occur in any measured interval.
_REMEMBERED = 64


class Pauses:
    """Detects pauses of the process: its owner calls `look` every `LOOK_INTERVAL_S`, and a late call was a pause.

    A blocked event loop counts as a pause, because it has the same effect on what is measured there.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        # The end and the length of each pause.
        self._pauses: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    def look(self) -> None:
        """Notes a pause if the last call was too long ago."""
        now = self._clock()
        since_s = now - self._looked
        self._looked = now
        if since_s > _LATE_S:
            self._pauses.append((now, since_s - LOOK_INTERVAL_S))
            logger.warning("the process was paused for %.1f s", since_s - LOOK_INTERVAL_S)

    def ran_since(self, moment: float) -> float:
        """Returns the seconds for which the process ran since a moment of the clock."""
        self.look()
        paused_s = sum(length_s for ended, length_s in self._pauses if ended > moment)
        return max(0.0, self._clock() - moment - paused_s)
