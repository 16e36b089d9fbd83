"""Limits the samples and the prompt tokens that wait for a slot."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from prometheus_client import Gauge

from shared.errors import ResourceExhausted

# The last samples that got a slot; they show how fast the queue moves.
_REMEMBERED = 32
_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 60.0


@dataclass
class Call:
    """What waits of one call, which may make several requests, and who pays for the tokens that it uses."""

    requests: int = 0
    prompt_tokens: int = 0
    charge: Callable[[int], None] = field(default=lambda tokens: None)


class Admission:
    """Counts the samples that wait for a slot and their prompt tokens, and rejects requests beyond the limits.

    A call that exceeds a limit by itself is accepted if nothing else waits.
    """

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
        # When samples got their slots.
        self._admitted_at: deque[float] = deque(maxlen=_REMEMBERED)

    def enter(self, samples: int, call: Call) -> "Ticket":
        """Returns a ticket for one more request of a call; raises `ResourceExhausted` if too many samples wait."""
        if self._requests > call.requests and self._requests + samples > self._max_requests:
            raise self._refusal(
                f"{self._requests} requests are waiting already, and {samples} more would exceed the limit of "
                f"{self._max_requests}"
            )
        if not self._requests:
            # The speed of an earlier queue says nothing about a new one.
            self._admitted_at.clear()
        self._count(samples, 0, call)
        return Ticket(self, samples, call)

    def _add_prompt_tokens(self, prompt_tokens: int, call: Call) -> None:
        if self._prompt_tokens > call.prompt_tokens and self._prompt_tokens + prompt_tokens > self._max_prompt_tokens:
            raise self._refusal(
                f"{self._prompt_tokens} prompt tokens are waiting already, and {prompt_tokens} more would exceed the "
                f"limit of {self._max_prompt_tokens}"
            )
        self._count(0, prompt_tokens, call)

    def _note_admitted(self, samples: int) -> None:
        self._admitted_at.extend([self._clock()] * samples)

    def _refusal(self, reason: str) -> ResourceExhausted:
        retry_after_s = self._retry_after_s()
        return ResourceExhausted(f"{reason}; retry in {retry_after_s:.1f} s.", retry_after_s)

    def _retry_after_s(self) -> float:
        """Returns the time in which half of the queue gets a slot at the recent speed."""
        if len(self._admitted_at) < 2:
            return 1.0
        interval_s = (self._clock() - self._admitted_at[0]) / (len(self._admitted_at) - 1)
        return min(max(self._requests / 2 * interval_s, _SHORTEST_RETRY_S), _LONGEST_RETRY_S)

    def _count(self, requests: int, prompt_tokens: int, call: Call) -> None:
        self._requests += requests
        self._prompt_tokens += prompt_tokens
        call.requests += requests
        call.prompt_tokens += prompt_tokens
        self._waiting.set(self._requests)


class Ticket:
    """The share of one request of a call in what waits. Leaving its `with` block gives it back."""

    def __init__(self, admission: Admission, samples: int, call: Call) -> None:
        self._admission = admission
        self._samples = samples
        self._call = call
        self._prompt_tokens = 0
        self._left = False

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def add_prompt_tokens(self, prompt_tokens: int) -> None:
        """Counts the prompt once its length is known; raises `ResourceExhausted` if too many prompt tokens wait."""
        self._admission._add_prompt_tokens(prompt_tokens, self._call)
        self._prompt_tokens = prompt_tokens

    def charge(self, tokens: int) -> None:
        """Charges the client of the call for tokens."""
        self._call.charge(tokens)

    def admitted(self) -> None:
        """Notes that the request has its slots and no longer waits."""
        self._admission._note_admitted(self._samples)
        self._leave()

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._admission._count(-self._samples, -self._prompt_tokens, self._call)
