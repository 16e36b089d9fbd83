"""The workers that are alive, each with what it offers, in Redis."""

from typing import Any, cast

from redis import Redis

from trainer_service.jobs.keys import Keys
from trainer_service.jobs.needs import Offer
from trainer_service.redis_client import reachable

# A worker renews its lease about every second.
_LEASE_S = 8


class LiveWorkers:
    """The live workers of one registry, on any machine. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, connection: Redis, keys: Keys) -> None:
        self._redis = connection
        self._keys = keys

    def renew(self, name: str, offer: Offer) -> None:
        """Renews the lease of a worker."""
        with reachable(self._redis):
            # Together, because `offers` removes a name without a lease.
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.sadd(self._keys.workers, name)
            pipeline.set(self._keys.worker(name), offer.to_json(), ex=_LEASE_S)
            pipeline.execute()

    def end(self, name: str) -> None:
        """Ends the lease of a worker."""
        with reachable(self._redis):
            self._redis.delete(self._keys.worker(name))
            self._redis.srem(self._keys.workers, name)

    def offers(self) -> list[Offer]:
        """Returns what each live worker offers."""
        with reachable(self._redis):
            names = list(cast(set[bytes], self._redis.smembers(self._keys.workers)))
            pipeline = self._redis.pipeline(transaction=False)
            for name in names:
                pipeline.get(self._keys.worker(name.decode(errors="replace")))
            answers: list[Any] = pipeline.execute()
            if gone := [name for name, answer in zip(names, answers, strict=True) if answer is None]:
                self._redis.srem(self._keys.workers, *gone)
        return [Offer.from_json(answer) for answer in answers if answer is not None]

    def count(self) -> int:
        """Counts the live workers."""
        return len(self.offers())
