"""Failures of Redis as `Unavailable`, and a limit on how long they may last."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from trainer_service.redis_server import redis_failure


@contextmanager
def reachable() -> Iterator[None]:
    """Turns every error of Redis into `Unavailable`."""
    try:
        yield
    except RedisError as error:
        raise redis_failure(error) from error


class Outage:
    """Measures how long Redis has not answered; retries end after `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None

    def end(self) -> None:
        """Notes that Redis answered."""
        self._since_s = None

    @property
    def has_begun(self) -> bool:
        """Whether Redis did not answer the last call."""
        return self._since_s is not None

    def may_retry(self) -> bool:
        """Notes that Redis did not answer; returns whether the outage is still shorter than `limit_s`."""
        if self._since_s is None:
            self._since_s = time.monotonic()
        return time.monotonic() - self._since_s < self._limit_s
