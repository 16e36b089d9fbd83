"""The bound on what waits: so many samples, so many prompt tokens."""

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import Gauge

from shared.errors import ResourceExhausted

# Of so many that got a slot last, the time that the queue moves with is known.
_REMEMBERED = 32
_SHORTEST_S, _LONGEST_S = 0.1, 60.0


class Admission:
    """Counts the samples that wait for a slot, and their prompt tokens."""

    def __init__(
        self,
        max_requests: int,
        max_prompt_tokens: int,
        waiting: Gauge,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_requests = max_requests
        self._max_prompt_tokens = max_prompt_tokens
        self._waiting = waiting
        self._clock = clock
        self._requests = 0
        self._prompt_tokens = 0
        # When samples got a slot.
        self._moved: deque[float] = deque(maxlen=_REMEMBERED)

    def enter(self, samples: int) -> "Place":
        """A place for one more request, of so many samples; raises `ResourceExhausted` where too many wait."""
        # What would pass a limit by itself has its turn alone.
        if self._requests and self._requests + samples > self._max_requests:
            raise self._refusal(
                f"{self._requests} requests wait already, and {samples} more would pass the limit of "
                f"{self._max_requests}"
            )
        if not self._requests:
            # How fast another queue once moved says nothing of this one.
            self._moved.clear()
        self._count(samples, 0)
        return Place(self, samples)

    def _weigh(self, prompt_tokens: int) -> None:
        if self._prompt_tokens and self._prompt_tokens + prompt_tokens > self._max_prompt_tokens:
            raise self._refusal(
                f"{self._prompt_tokens} prompt tokens wait already, and {prompt_tokens} more would pass the limit of "
                f"{self._max_prompt_tokens}"
            )
        self._count(0, prompt_tokens)

    def _refusal(self, reason: str) -> ResourceExhausted:
        retry_after_s = self._half_drained_s()
        return ResourceExhausted(f"{reason}; ask again in {retry_after_s:.1f} s.", retry_after_s)

    def _half_drained_s(self) -> float:
        """When half of those that wait now will have a slot, if the queue moves on as it has of late."""
        if len(self._moved) < 2:
            return 1.0
        interval_s = (self._clock() - self._moved[0]) / (len(self._moved) - 1)
        return min(max(self._requests / 2 * interval_s, _SHORTEST_S), _LONGEST_S)

    def _count(self, requests: int, prompt_tokens: int) -> None:
        self._requests += requests
        self._prompt_tokens += prompt_tokens
        self._waiting.set(self._requests)


class Place:
    """One request's share of what waits, until it leaves."""

    def __init__(self, admission: Admission, samples: int) -> None:
        self._admission = admission
        self._samples = samples
        self._prompt_tokens = 0
        self._left = False

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def weigh(self, prompt_tokens: int) -> None:
        """Says how long the prompt is, once it is known; raises `ResourceExhausted`."""
        self._admission._weigh(prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def admitted(self) -> None:
        """The request has its slots: it does not wait any more."""
        self._admission._moved.extend([self._admission._clock()] * self._samples)
        self._leave()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._admission._count(-self._samples, -self._prompt_tokens)
