"""Ends a rank that makes no progress: one that waits inside MLX for a rank that is stuck never returns by itself."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Self

logger = logging.getLogger(__name__)

# The process ends with this code, `EX_TEMPFAIL`: another attempt may succeed.
EXIT_CODE = 75
LEAST_S = 60.0
# Before the length of a step is known; the first one also compiles.
FIRST_S = 600.0
_MEDIANS = 20
_REMEMBERED = 50
_INTERVAL_S = 0.5
# A thread that runs this much later than planned was frozen with its process.
_FROZEN_S = 5.0


class Watchdog:
    """Ends the process if no step follows the one before within `LEAST_S` or 20 times the median of the last intervals,
    whichever is longer, or the first one within `FIRST_S`.

    A thread of its own watches, because a thread that waits inside MLX runs neither Python nor its signal handlers.
    """

    def __init__(self, end: Callable[[int], object] = os._exit, clock: Callable[[], float] = time.monotonic) -> None:
        self._end = end
        self._clock = clock
        self._lock = threading.Lock()
        # When the last step ended; None before the first.
        self._beat_s: float | None = None
        self._is_paused = False
        self._intervals_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def beat(self) -> None:
        """Notes that a step has ended, after which another one is expected."""
        with self._lock:
            now_s = self._clock()
            if self._beat_s is not None and not self._is_paused:
                self._intervals_s.append(now_s - self._beat_s)
            self._beat_s = now_s

    def watched(self, stop_requested: Callable[[], bool]) -> Callable[[], bool]:
        """Returns the function, which the training loop calls after each step, with a `beat` in it."""

        def beat_and_ask() -> bool:
            self.beat()
            return stop_requested()

        return beat_and_ask

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Expects no step in a block, such as while rank 0 evaluates and the others wait for it."""
        with self._lock:
            self._is_paused = True
        try:
            yield
        finally:
            with self._lock:
                self._is_paused = False
                self._beat_s = None if self._beat_s is None else self._clock()

    def look(self, late_s: float = 0.0) -> None:
        """Ends the process if it is stuck; `late_s` is a time in which nothing could happen."""
        with self._lock:
            if self._beat_s is None or self._is_paused:
                return
            now_s = self._clock()
            self._beat_s = min(self._beat_s + late_s, now_s)
            limit_s = max(LEAST_S, _MEDIANS * median(self._intervals_s)) if self._intervals_s else FIRST_S
            waited_s = now_s - self._beat_s
        if waited_s > limit_s:
            sentence = f"No step ended within {limit_s:.0f} s: another rank is stuck or cannot be reached."
            logger.error("%s This process ends.", sentence)
            # For the process that started this one.
            print(sentence, flush=True)
            self._end(EXIT_CODE)

    def _run(self) -> None:
        turn_s = self._clock()
        while not self._closing.wait(_INTERVAL_S):
            now_s = self._clock()
            late_s = now_s - turn_s
            turn_s = now_s
            self.look(late_s if late_s > _FROZEN_S else 0.0)
