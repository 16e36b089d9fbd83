"""The queue of jobs: RQ hands each attempt at one to a worker, and Redis keeps how all of them stand.

gptloop:jobs            sorted set of job ids, by the time they were enqueued
gptloop:open            set of the ids of those that have not ended
gptloop:job:<id>        hash: kind, spec, after, state, attempt, times, reason, the last of some events
gptloop:events:<id>     stream of everything that the job told
gptloop:lease:<id>      the number of the attempt that makes progress, there while it does
gptloop:worker:<name>   there while a worker lives
gptloop:tokens          tokens that all jobs ever trained on

Every attempt at a job has a number and is an RQ job of its own, which RQ never tries again. Who changes a job names the
attempt that it works on, and nothing happens where there is a later one. So a process that was given up for dead, but
lives, can say nothing any more.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError, WatchError
from rq import Queue
from rq.serializers import JSONSerializer

from shared.errors import FailedPrecondition, NotFound
from trainer_service.events import Evaluation, JobState, Progress, RunStarted, StateChanged, TimedEvent
from trainer_service.kinds import Kind, Spec
from trainer_service.records import Fields, JobRecord, last_told, read_record
from trainer_service.redis_server import redis_failure
from trainer_service.rq_jobs import JOB_FUNCTION, QUEUE_NAME, AttemptJob

# A lease is renewed every second or so; whoever does not renew it for so long is gone.
LEASE_S = 8
# A process that is about to start has longer until it renews its lease for the first time.
START_LEASE_S = 30
# A crash is followed by another attempt after so many seconds, and the last by none. A run that got further than at its
# last crash begins anew to count.
BACKOFF_S = (0.0, 10.0, 60.0)

# Why a job is given back by a worker that ends.
STOPPED = "The worker was stopped; the job goes on when one is back."

_KEPT_EVENTS = 100_000
# Of jobs that ended, for so long.
_KEPT_S = 30 * 24 * 3600
_READ_AT_ONCE = 200


class JobQueue:
    """Everything that is known of jobs. Never loads a model framework. Raises `Unavailable` where Redis is gone."""

    def __init__(self, connection: Redis) -> None:
        self._redis = connection
        self.rq = Queue(
            QUEUE_NAME, connection=connection, serializer=JSONSerializer, job_class=AttemptJob, default_timeout=-1
        )

    # What clients ask.

    def enqueue(self, kind: Kind, spec: Spec, after: Sequence[str] = ()) -> JobRecord:
        """Puts a job at the end of the queue; one that comes `after` others goes there when they have finished.

        Raises `NotFound` or `FailedPrecondition` where one of those does not exist or can finish no more.
        """
        for other in after:
            if self.get(other).state in (JobState.FAILED, JobState.CANCELLED):
                raise FailedPrecondition(f"The job {other} has not finished, so nothing can come after it.")
        job_id, now = secrets.token_hex(4), time.time()
        with _reachable():
            pipeline = self._redis.pipeline()
            pipeline.hset(
                _job_key(job_id),
                mapping={
                    "kind": kind.value,
                    "spec": spec.to_json(),
                    "after": " ".join(after),
                    "enqueued_at": now,
                    "attempt": 1,
                },
            )
            pipeline.zadd("gptloop:jobs", {job_id: now})
            pipeline.sadd("gptloop:open", job_id)
            self._tell(pipeline, job_id, [TimedEvent(StateChanged(JobState.QUEUED))])
            if not after:
                self._send(pipeline, job_id, 1)
            pipeline.execute()
        return self.get(job_id)

    def get(self, job_id: str) -> JobRecord:
        """A job; raises `NotFound`."""
        (record,) = self._read([job_id])
        if record is None:
            raise NotFound(f"There is no job {job_id!r}; `make jobs` lists those that exist.")
        return record

    def jobs(
        self, states: Sequence[JobState] = (), kinds: Sequence[Kind] = (), before: float | None = None
    ) -> Iterator[JobRecord]:
        """Every job, or those of some states and kinds and enqueued before a time, the newest first; read as far as
        they are asked for."""
        newest = "+inf" if before is None else f"({before!r}"
        with _reachable():
            ids: Any = self._redis.zrevrangebyscore("gptloop:jobs", newest, "-inf")
        for start in range(0, len(ids), _READ_AT_ONCE):
            for record in self._read([job_id.decode() for job_id in ids[start : start + _READ_AT_ONCE]]):
                if record and (not states or record.state in states) and (not kinds or record.kind in kinds):
                    yield record

    def _read(self, ids: Sequence[str]) -> list[JobRecord | None]:
        """The records of jobs; None for those that are gone or cannot be understood."""
        with _reachable():
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hgetall(_job_key(job_id))
                pipeline.get(_lease_key(job_id))
            answers = pipeline.execute()
        records = []
        for job_id, found, lease in zip(ids, answers[::2], answers[1::2], strict=True):
            fields = _decoded(found)
            records.append(read_record(job_id, fields, _is_leased(fields, lease)))
        return records

    def cancel(self, job_id: str) -> JobRecord:
        """Asks a job to end: a waiting one ends now. Raises `NotFound`, or `FailedPrecondition` where it has ended."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            waiting = JobState(fields["state"]) is JobState.QUEUED
            state = JobState.CANCELLED if waiting else JobState.CANCELLING
            pipeline.hset(_job_key(job_id), "cancel", "1")
            self._tell(pipeline, job_id, [TimedEvent(StateChanged(state))])

        if not self._change(job_id, None, change):
            raise FailedPrecondition(f"The job {job_id} is {self.get(job_id).state.value} already.")
        record = self.get(job_id)
        waiting = _rq_id(job_id, record.attempt)
        with _reachable():
            if self.rq.remove(waiting):
                self._redis.delete(AttemptJob.key_for(waiting))
        return record

    def read_events(self, job_id: str, after: str = "0", wait_s: float = 0.0) -> list[tuple[str, TimedEvent]]:
        """What a job told after an event's id, each with its id; waits so long where there is nothing new yet."""
        with _reachable():
            block_ms = round(wait_s * 1000) or None
            answer: Any = self._redis.xread({_events_key(job_id): after}, count=1000, block=block_ms)
        if not answer:
            return []
        entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        return [(entry_id.decode(), TimedEvent.from_json(values[b"event"])) for entry_id, values in entries]

    # What an attempt says of itself.

    def tell(self, job_id: str, attempt: int, events: Sequence[TimedEvent], new_tokens: int = 0) -> bool:
        """Adds what an attempt told, and the tokens that it trained on meanwhile; False where there is a later one."""

        def change(pipeline: Pipeline, _: Fields) -> None:
            self._tell(pipeline, job_id, events)
            if new_tokens:
                pipeline.incrby("gptloop:tokens", new_tokens)

        return self._change(job_id, attempt, change)

    def is_current(self, job_id: str, attempt: int) -> bool:
        """Whether an attempt is the job's latest, and the job has not ended."""
        with _reachable():
            state, latest = cast(list[bytes | None], self._redis.hmget(_job_key(job_id), ["state", "attempt"]))
        if state is None or latest is None:
            return False
        return not JobState(state.decode()).is_final and int(latest) == attempt

    def cancel_requested(self, job_id: str) -> bool:
        """Whether somebody asked the job to end."""
        with _reachable():
            return bool(self._redis.hexists(_job_key(job_id), "cancel"))

    def give_back(self, job_id: str, attempt: int, reason: str) -> bool:
        """Ends an attempt that was interrupted; the next one follows at once, and can be made by another worker."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if not self._ends_cancelled(pipeline, job_id, fields):
                self._next_attempt(pipeline, job_id, attempt, StateChanged(JobState.QUEUED, reason), 0.0)

        return self._change(job_id, attempt, change)

    def lose(self, job_id: str, attempt: int, reason: str) -> bool:
        """Ends an attempt that crashed; the next one follows after a while, if there were not too many."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if self._ends_cancelled(pipeline, job_id, fields):
                return
            # What an attempt began with is what those before it have kept.
            started = last_told(RunStarted, fields)
            step = started.first_step if started else 0
            further = step > int(fields.get("crash_step", -1))
            crashes = 1 if further else 1 + int(fields["crashes"])
            pipeline.hset(_job_key(job_id), mapping={"crashes": crashes, "crash_step": step})
            if crashes > len(BACKOFF_S):
                event = StateChanged(JobState.FAILED, f"{reason}, too often without getting any further.")
                self._tell(pipeline, job_id, [TimedEvent(event)])
            else:
                delay_s = BACKOFF_S[crashes - 1]
                when = f"in {delay_s:.0f} s" if delay_s else "now"
                event = StateChanged(JobState.QUEUED, f"{reason}. It goes on from its last state {when}.")
                self._next_attempt(pipeline, job_id, attempt, event, delay_s)

        return self._change(job_id, attempt, change)

    def renew_job_lease(self, job_id: str, attempt: int, seconds: int = LEASE_S) -> None:
        """Says that an attempt makes progress; nothing happens where there is a later one."""
        self._change(job_id, attempt, lambda pipeline, _: pipeline.set(_lease_key(job_id), attempt, ex=seconds))

    # What workers do for all.

    def send_ready(self) -> None:
        """Hands over the jobs whose time has come, and ends those that wait for one that can finish no more."""
        for job_id, fields in self._open_jobs().items():
            if int(fields.get("sent", 0)) == int(fields["attempt"]) or float(fields.get("ready_at", 0)) > time.time():
                continue
            # Once a job has begun it waits for no other.
            after = [] if "sent" in fields else fields["after"].split()
            others = dict(zip(after, self._read(after), strict=True))
            if lost := [name for name, other in others.items() if not other or _can_finish_no_more(other)]:
                reason = f"The job {lost[0]}, which comes before it, has not finished."
                self.tell(job_id, int(fields["attempt"]), [TimedEvent(StateChanged(JobState.CANCELLED, reason))])
            elif all(other and other.state is JobState.FINISHED for other in others.values()):
                self._change(job_id, int(fields["attempt"]), lambda pipeline, now: self._send_once(pipeline, now))

    def unattended(self) -> dict[str, int]:
        """The jobs with their attempts that were handed over, but neither wait in the queue nor make progress."""
        with _reachable():
            waiting = set(self.rq.job_ids)
        found = {}
        for job_id, fields in self._open_jobs().items():
            attempt = int(fields["attempt"])
            sent = int(fields.get("sent", 0)) == attempt
            if sent and "leased" not in fields and _rq_id(job_id, attempt) not in waiting:
                found[job_id] = attempt
        return found

    def renew_worker_lease(self, name: str) -> None:
        """Says that a worker lives."""
        with _reachable():
            self._redis.set(f"gptloop:worker:{name}", 1, ex=LEASE_S)

    def end_worker_lease(self, name: str) -> None:
        """Says that a worker is gone."""
        with _reachable():
            self._redis.delete(f"gptloop:worker:{name}")

    # Figures.

    def waiting(self) -> int:
        """How many jobs wait for a worker, for others or for their next attempt."""
        return sum(JobState(fields["state"]) is JobState.QUEUED for fields in self._open_jobs().values())

    def live_workers(self) -> int:
        """How many workers live."""
        with _reachable():
            return sum(1 for _ in self._redis.scan_iter("gptloop:worker:*"))

    def tokens(self) -> int:
        """How many tokens all jobs ever trained on."""
        with _reachable():
            value: Any = self._redis.get("gptloop:tokens")
        return int(value or 0)

    # How it is done.

    def _open_jobs(self) -> dict[str, Fields]:
        """The fields of the jobs that have not ended; `leased` is there where an attempt makes progress."""
        with _reachable():
            ids: Any = self._redis.smembers("gptloop:open")
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hgetall(_job_key(job_id.decode()))
                pipeline.get(_lease_key(job_id.decode()))
            answers = pipeline.execute()
        found = {}
        for job_id, values, lease in zip(ids, answers[::2], answers[1::2], strict=True):
            fields = _decoded(values)
            # Others than this program may have written to Redis.
            if {"state", "attempt", "after"} <= fields.keys() and fields["attempt"].isdecimal():
                found[job_id.decode()] = fields | ({"leased": "1"} if _is_leased(fields, lease) else {})
        return found

    def _change(self, job_id: str, attempt: int | None, change: Callable[[Pipeline, Fields], object]) -> bool:
        """Makes a change in one transaction, unless the job has ended or is at another attempt; raises `NotFound`."""
        key = _job_key(job_id)
        with _reachable():
            pipeline = self._redis.pipeline()
            while True:
                pipeline.watch(key)
                held: Any = pipeline.hgetall(key)
                fields = _decoded(held)
                if not fields:
                    raise NotFound(f"There is no job {job_id!r}; `make jobs` lists those that exist.")
                if JobState(fields["state"]).is_final or attempt not in (None, int(fields["attempt"])):
                    pipeline.reset()
                    return False
                pipeline.multi()
                change(pipeline, {**fields, "id": job_id})
                try:
                    pipeline.execute()
                    return True
                except WatchError:
                    continue

    def _tell(self, pipeline: Pipeline, job_id: str, events: Sequence[TimedEvent]) -> None:
        key = _job_key(job_id)
        for timed in events:
            text, event = timed.to_json(), timed.event
            pipeline.xadd(_events_key(job_id), {"event": text}, maxlen=_KEPT_EVENTS, approximate=True)
            if isinstance(event, RunStarted | Progress | Evaluation):
                pipeline.hset(key, type(event).__name__, text)
            elif isinstance(event, StateChanged):
                pipeline.hset(key, mapping={"state": event.state.value, "reason": event.reason})
                if event.state is JobState.RUNNING:
                    pipeline.hsetnx(key, "started_at", str(timed.time))
                elif event.state.is_final:
                    pipeline.hset(key, "ended_at", timed.time)
                    pipeline.delete(_lease_key(job_id))
                    pipeline.srem("gptloop:open", job_id)
                    for each in (key, _events_key(job_id)):
                        pipeline.expire(each, _KEPT_S)

    def _send(self, pipeline: Pipeline, job_id: str, attempt: int) -> None:
        job = self.rq.create_job(
            JOB_FUNCTION, args=(job_id, attempt), job_id=_rq_id(job_id, attempt), result_ttl=60, failure_ttl=60
        )
        # As RQ's enqueue does, which would begin a transaction of its own.
        job.save(pipeline=pipeline)
        pipeline.sadd(self.rq.redis_queues_keys, self.rq.key)
        self.rq.push_job_id(job.id, pipeline=pipeline)
        pipeline.hset(_job_key(job_id), "sent", attempt)

    def _send_once(self, pipeline: Pipeline, fields: Fields) -> None:
        if int(fields.get("sent", 0)) != int(fields["attempt"]):
            self._send(pipeline, fields["id"], int(fields["attempt"]))

    def _next_attempt(self, pipeline: Pipeline, job_id: str, attempt: int, event: StateChanged, delay_s: float) -> None:
        pipeline.hset(_job_key(job_id), mapping={"attempt": attempt + 1, "ready_at": time.time() + delay_s})
        pipeline.delete(_lease_key(job_id))
        self._tell(pipeline, job_id, [TimedEvent(event)])
        if not delay_s:
            self._send(pipeline, job_id, attempt + 1)

    def _ends_cancelled(self, pipeline: Pipeline, job_id: str, fields: Fields) -> bool:
        """Ends a job whose end somebody asked for, and which has no process any more that could do it."""
        if "cancel" in fields:
            self._tell(pipeline, job_id, [TimedEvent(StateChanged(JobState.CANCELLED))])
        return "cancel" in fields


def _is_leased(fields: Fields, lease: bytes | None) -> bool:
    """Whether the job's latest attempt holds a lease; one of an earlier attempt is none."""
    return lease is not None and lease.decode() == fields.get("attempt")


def _can_finish_no_more(record: JobRecord) -> bool:
    return record.state in (JobState.FAILED, JobState.CANCELLED)


def _decoded(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(): value.decode() for key, value in fields.items()}


def _rq_id(job_id: str, attempt: int) -> str:
    return f"{job_id}-{attempt}"


def _job_key(job_id: str) -> str:
    return f"gptloop:job:{job_id}"


def _events_key(job_id: str) -> str:
    return f"gptloop:events:{job_id}"


def _lease_key(job_id: str) -> str:
    return f"gptloop:lease:{job_id}"


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise redis_failure(error) from error
