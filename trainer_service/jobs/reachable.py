"""Redis that does not do what was asked, as an error of ours, and for how long that may go on."""

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


class Patience:
    """Counts for how long Redis has not answered; after `limit_s` it is over."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since_s: float | None = None

    def reset(self) -> None:
        """Redis answered."""
        self._since_s = None

    @property
    def is_tried(self) -> bool:
        """Whether Redis did not answer the last time."""
        return self._since_s is not None

    def try_again(self) -> bool:
        """Redis did not answer; whether that has not lasted for too long."""
        if self._since_s is None:
            self._since_s = time.monotonic()
        return time.monotonic() - self._since_s < self._limit_s
