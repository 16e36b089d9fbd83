"""The bound on what waits: so many requests, so many prompt tokens."""

from prometheus_client import Gauge

from shared.errors import ResourceExhausted


class Admission:
    """Counts the requests that wait for a slot, and their prompt tokens."""

    def __init__(self, max_requests: int, max_prompt_tokens: int, waiting: Gauge) -> None:
        self._max_requests = max_requests
        self._max_prompt_tokens = max_prompt_tokens
        self._waiting = waiting
        self._requests = 0
        self._prompt_tokens = 0

    def enter(self) -> "Place":
        """A place for one more request; raises `ResourceExhausted` where too many wait."""
        if self._requests >= self._max_requests:
            raise ResourceExhausted(f"{self._requests} requests wait already, as many as may; ask again later.")
        self._count(1, 0)
        return Place(self)

    def _weigh(self, prompt_tokens: int) -> None:
        if self._prompt_tokens + prompt_tokens > self._max_prompt_tokens:
            raise ResourceExhausted(
                f"{self._prompt_tokens} prompt tokens wait already, and {prompt_tokens} more would pass the limit of "
                f"{self._max_prompt_tokens}; ask again later."
            )
        self._count(0, prompt_tokens)

    def _count(self, requests: int, prompt_tokens: int) -> None:
        self._requests += requests
        self._prompt_tokens += prompt_tokens
        self._waiting.set(self._requests)


class Place:
    """One request's share of what waits, until it leaves."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._prompt_tokens = 0
        self._left = False

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def weigh(self, prompt_tokens: int) -> None:
        """Says how long the prompt is, once it is known; raises `ResourceExhausted`."""
        self._admission._weigh(prompt_tokens)
        self._prompt_tokens = prompt_tokens

    def leave(self) -> None:
        """The request does not wait any more; a second time changes nothing."""
        if not self._left:
            self._left = True
            self._admission._count(-1, -self._prompt_tokens)
