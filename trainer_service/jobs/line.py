"""The line in which attempts at jobs wait for a worker: RQ's queue, kept in the order in which jobs were enqueued."""

from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from rq import Queue
from rq.serializers import JSONSerializer

from trainer_service.jobs.keys import Keys
from trainer_service.jobs.reachable import reachable
from trainer_service.jobs.records import number_of
from trainer_service.jobs.rq_adapter import JOB_FUNCTION, AttemptJob


class Line:
    """What waits for a worker. Every attempt is an RQ job of its own, which RQ never tries again.

    A job that comes back into the line, or that waited for others before, takes the place that it was given when it was
    enqueued, and so passes those that were enqueued later.
    """

    def __init__(self, connection: Redis, keys: Keys) -> None:
        self._redis = connection
        self._keys = keys
        self.rq = Queue(
            keys.queue_name, connection=connection, serializer=JSONSerializer, job_class=AttemptJob, default_timeout=-1
        )

    def attempts(self) -> list[tuple[str, int]]:
        """The jobs that wait with the number of the attempt, in the order in which workers take them."""
        with reachable():
            ids = cast(list[bytes], self._redis.lrange(self.rq.key, 0, -1))
        found = []
        for rq_id in ids:
            registry, _, rest = rq_id.decode(errors="replace").partition("-")
            job_id, _, attempt = rest.rpartition("-")
            # Others than this program may have written to Redis.
            number = number_of(attempt)
            if registry == self._keys.registry and number is not None:
                found.append((job_id, number))
        return found

    def insert(self, pipeline: Pipeline, job_id: str, attempt: int, place: float) -> None:
        """Lets an attempt wait at its job's place, as part of a transaction that watches RQ's queue."""
        job = self.rq.create_job(
            JOB_FUNCTION, args=(job_id, attempt), job_id=self._rq_id(job_id, attempt), result_ttl=60, failure_ttl=60
        )
        # As RQ's enqueue does, which would begin a transaction of its own.
        job.save(pipeline=pipeline)
        pipeline.sadd(self.rq.redis_queues_keys, self.rq.key)
        behind = self._first_behind(place)
        if behind is None:
            self.rq.push_job_id(job.id, pipeline=pipeline)
        else:
            pipeline.linsert(self.rq.key, "before", behind, job.id)

    def remove(self, job_id: str, attempt: int) -> None:
        """Takes an attempt out of the line, if it waits there."""
        rq_id = self._rq_id(job_id, attempt)
        if self.rq.remove(rq_id):
            self._redis.delete(AttemptJob.key_for(rq_id))

    def _first_behind(self, place: float) -> str | None:
        """What RQ calls the first attempt in the line whose job has a later place."""
        waiting = self.attempts()
        if not waiting:
            return None
        places: Any = self._redis.zmscore(self._keys.jobs, [job_id for job_id, _ in waiting])
        for (job_id, attempt), other in zip(waiting, places, strict=True):
            if other is not None and float(other) > place:
                return self._rq_id(job_id, attempt)
        return None

    def _rq_id(self, job_id: str, attempt: int) -> str:
        return f"{self._keys.registry}-{job_id}-{attempt}"
