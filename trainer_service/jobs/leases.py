"""Leases: keys in Redis that expire unless their owner renews them. Each working attempt has one, and each worker."""

import secrets
from itertools import count
from typing import cast

from redis.client import Pipeline

from trainer_service.jobs.job_store import JobStore
from trainer_service.jobs.reachable import reachable
from trainer_service.jobs.records import Fields, Lease

# Owners renew their lease about every second; an owner that has not renewed it for this long is gone.
LEASE_S = 8
# A starting process has longer until its first renewal.
START_LEASE_S = 30


class Leases:
    """Renews leases and counts the live workers. Every method raises `Unavailable` if Redis does not answer."""

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self._redis, self._keys = store.redis, store.keys
        self._beats = count()
        self._sender = secrets.token_hex(4)

    def renew_attempt(self, job_id: str, attempt: int, seconds: int = LEASE_S) -> None:
        """Renews the lease of an attempt that makes progress; does nothing if there is a later attempt."""
        lease = Lease(attempt, seconds, f"{self._sender}-{next(self._beats)}")

        def change(pipeline: Pipeline, _: Fields) -> None:
            pipeline.set(self._keys.lease(job_id), lease.to_text(), ex=seconds)

        self._store.change(job_id, attempt, change)

    def renew_worker(self, name: str) -> None:
        """Renews the lease of a worker."""
        with reachable():
            self._redis.sadd(self._keys.workers, name)
            self._redis.set(self._keys.worker(name), 1, ex=LEASE_S)

    def end_worker(self, name: str) -> None:
        """Ends the lease of a worker."""
        with reachable():
            self._redis.delete(self._keys.worker(name))
            self._redis.srem(self._keys.workers, name)

    def live_workers(self) -> int:
        """Counts the live workers."""
        with reachable():
            names = cast(set[bytes], self._redis.smembers(self._keys.workers))
            gone = [name for name in names if not self._redis.exists(self._keys.worker(name.decode()))]
            if gone:
                self._redis.srem(self._keys.workers, *gone)
        return len(names) - len(gone)
