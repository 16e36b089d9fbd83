"""The queue of training jobs: RQ carries them, and Redis keeps what they tell.

gptloop:jobs            sorted set of job ids, by the time they were enqueued
gptloop:job:<id>        hash: spec, state, times, last progress and evaluation, failure
gptloop:events:<id>     stream of everything that the job told
gptloop:cancel:<id>     there where somebody asked the job to end
gptloop:lease:<id>      there while a process works on the job
gptloop:worker:<name>   there while a worker lives
gptloop:tokens          tokens that all jobs ever trained on
"""

import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue, Retry
from rq.serializers import JSONSerializer

from shared.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from trainer_service.events import Evaluation, JobState, Progress, StateChanged, TimedEvent
from trainer_service.spec import JobSpec

logger = logging.getLogger(__name__)

QUEUE_NAME = "gptloop"
JOB_FUNCTION = "trainer_service.jobs.run_training"

# A lease is renewed every few seconds; whoever does not renew it for so long is gone.
LEASE_S = 15

# A crashed process is started anew so many times, each time from the run's last state.
_CRASH_RETRIES = 3
_KEPT_EVENTS = 100_000


@dataclass(frozen=True)
class JobRecord:
    """A job as it stands; times in seconds since the epoch, None for what has not happened.

    `is_held` says whether a process works on it now.
    """

    id: str
    spec: JobSpec
    state: JobState
    enqueued_at: float
    started_at: float | None
    ended_at: float | None
    progress: Progress | None
    evaluation: Evaluation | None
    failure: str
    is_held: bool


class JobQueue:
    """Everything that is known of jobs. Never loads a model framework. Raises `Unavailable` where Redis is gone."""

    def __init__(self, connection: Redis) -> None:
        self._redis = connection
        self.rq = Queue(QUEUE_NAME, connection=connection, serializer=JSONSerializer, default_timeout=-1)

    def enqueue(self, spec: JobSpec) -> JobRecord:
        """Puts a job at the end of the queue."""
        job_id = secrets.token_hex(4)
        with _reachable():
            pipeline = self._redis.pipeline()
            self.rq.enqueue(
                JOB_FUNCTION,
                args=(job_id, spec.to_json()),
                job_id=job_id,
                retry=Retry(max=_CRASH_RETRIES),
                result_ttl=3600,
                failure_ttl=3600,
                pipeline=pipeline,
            )
            pipeline.hset(_job_key(job_id), mapping={"spec": spec.to_json(), "enqueued_at": time.time()})
            pipeline.zadd("gptloop:jobs", {job_id: time.time()})
            self._tell(pipeline, job_id, [TimedEvent(StateChanged(JobState.QUEUED))])
            pipeline.execute()
        return self.get(job_id)

    def get(self, job_id: str) -> JobRecord:
        """A job; raises `NotFound`."""
        with _reachable():
            values: dict[bytes, bytes] = self._redis.hgetall(_job_key(job_id))  # type: ignore[assignment]
            is_held = bool(self._redis.exists(_lease_key(job_id)))
        if not values:
            raise NotFound(f"There is no job {job_id!r}; `make jobs` lists those that exist.")
        return _record(job_id, {key.decode(): value.decode() for key, value in values.items()}, is_held)

    def jobs(self, states: Sequence[JobState] = ()) -> list[JobRecord]:
        """Every job, or those in some states, the newest first."""
        with _reachable():
            ids: Any = self._redis.zrevrange("gptloop:jobs", 0, -1)
        records = []
        for job_id in ids:
            try:
                records.append(self.get(job_id.decode()))
            except InvalidArgument as error:
                logger.warning("job %s is left out: %s", job_id.decode(), error)
        return [record for record in records if not states or record.state in states]

    def cancel(self, job_id: str) -> JobRecord:
        """Asks a job to end; raises `NotFound`, or `FailedPrecondition` where it has ended."""
        record = self.get(job_id)
        if record.state.is_final:
            raise FailedPrecondition(f"The job {job_id} is {record.state.value} already.")
        with _reachable():
            self._redis.set(_cancel_key(job_id), 1)
            if not record.is_held and self.rq.remove(job_id):
                self.tell(job_id, [TimedEvent(StateChanged(JobState.CANCELLED))])
            else:
                self.tell(job_id, [TimedEvent(StateChanged(JobState.CANCELLING))])
        return self.get(job_id)

    def cancel_requested(self, job_id: str) -> bool:
        """Whether somebody asked the job to end."""
        with _reachable():
            return bool(self._redis.exists(_cancel_key(job_id)))

    def tell(self, job_id: str, events: Sequence[TimedEvent], new_tokens: int = 0) -> None:
        """Adds what a job told, and the tokens that it trained on meanwhile, in one transaction."""
        with _reachable():
            pipeline = self._redis.pipeline()
            self._tell(pipeline, job_id, events)
            if new_tokens:
                pipeline.incrby("gptloop:tokens", new_tokens)
            pipeline.execute()

    def _tell(self, pipeline: Pipeline, job_id: str, events: Sequence[TimedEvent]) -> None:
        for timed in events:
            text, event = timed.to_json(), timed.event
            pipeline.xadd(f"gptloop:events:{job_id}", {"event": text}, maxlen=_KEPT_EVENTS, approximate=True)
            if isinstance(event, Progress):
                pipeline.hset(_job_key(job_id), "progress", text)
            elif isinstance(event, Evaluation):
                pipeline.hset(_job_key(job_id), "evaluation", text)
            elif isinstance(event, StateChanged):
                pipeline.hset(_job_key(job_id), mapping={"state": event.state.value, "failure": event.reason})
                if event.state is JobState.RUNNING:
                    pipeline.hsetnx(_job_key(job_id), "started_at", str(timed.time))
                elif event.state.is_final:
                    pipeline.hset(_job_key(job_id), "ended_at", timed.time)

    def read_events(self, job_id: str, after: str = "0", wait_s: float = 0.0) -> list[tuple[str, TimedEvent]]:
        """What a job told after an event's id, each with its id; waits so long where there is nothing new yet."""
        with _reachable():
            block_ms = round(wait_s * 1000) or None
            answer: Any = self._redis.xread({f"gptloop:events:{job_id}": after}, count=1000, block=block_ms)
        if not answer:
            return []
        entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        return [(entry_id.decode(), TimedEvent.from_json(values[b"event"])) for entry_id, values in entries]

    def renew_job_lease(self, job_id: str) -> None:
        """Says that a process works on the job."""
        with _reachable():
            self._redis.set(_lease_key(job_id), 1, ex=LEASE_S)

    def end_job_lease(self, job_id: str) -> None:
        """Says that no process works on the job any more."""
        with _reachable():
            self._redis.delete(_lease_key(job_id))

    def renew_worker_lease(self, name: str) -> None:
        """Says that a worker lives."""
        with _reachable():
            self._redis.set(f"gptloop:worker:{name}", 1, ex=LEASE_S)

    def end_worker_lease(self, name: str) -> None:
        """Says that a worker is gone."""
        with _reachable():
            self._redis.delete(f"gptloop:worker:{name}")

    def live_workers(self) -> int:
        """How many workers live."""
        with _reachable():
            return sum(1 for _ in self._redis.scan_iter("gptloop:worker:*"))

    def waiting(self) -> int:
        """How many jobs wait for a worker."""
        with _reachable():
            return self.rq.count

    def tokens(self) -> int:
        """How many tokens all jobs ever trained on."""
        with _reachable():
            value: Any = self._redis.get("gptloop:tokens")
        return int(value or 0)


def _record(job_id: str, values: dict[str, str], is_held: bool) -> JobRecord:
    def moment(name: str) -> float | None:
        return float(values[name]) if name in values else None

    progress = TimedEvent.from_json(values["progress"]).event if "progress" in values else None
    evaluation = TimedEvent.from_json(values["evaluation"]).event if "evaluation" in values else None
    assert progress is None or isinstance(progress, Progress)
    assert evaluation is None or isinstance(evaluation, Evaluation)
    return JobRecord(
        id=job_id,
        spec=JobSpec.from_json(values["spec"]),
        state=JobState(values["state"]),
        enqueued_at=float(values["enqueued_at"]),
        started_at=moment("started_at"),
        ended_at=moment("ended_at"),
        progress=progress,
        evaluation=evaluation,
        failure=values.get("failure", ""),
        is_held=is_held,
    )


def _job_key(job_id: str) -> str:
    return f"gptloop:job:{job_id}"


def _lease_key(job_id: str) -> str:
    return f"gptloop:lease:{job_id}"


def _cancel_key(job_id: str) -> str:
    return f"gptloop:cancel:{job_id}"


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise Unavailable(
            f"Redis does not answer ({str(error).rstrip('.')}). Start everything with `make up`, or set REDIS_URL."
        ) from error
