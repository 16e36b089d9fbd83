"""The queue of jobs of one registry: RQ hands each attempt at one to a worker, and Redis keeps how all of them stand.

Every attempt at a job has a number. Who changes a job names the attempt that it works on, and nothing happens where
there is a later one. So a process that was given up for dead, but lives, can say nothing any more.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline

from shared.errors import AlreadyExists, FailedPrecondition, shown
from trainer_service.jobs.events import JobState, Notice, RunStarted, StateChanged, TimedEvent
from trainer_service.jobs.job_store import JobStore, Lease, not_found
from trainer_service.jobs.kinds import Kind, Spec
from trainer_service.jobs.reachable import reachable
from trainer_service.jobs.records import Fields, JobRecord, attempt_of, last_told, number_of, state_of

# A lease is renewed every second or so; whoever does not renew it for so long is gone.
LEASE_S = 8
# A process that is about to start has longer until it renews its lease for the first time.
START_LEASE_S = 30
# A crash is followed by another attempt after so many seconds, and the last by none. A run that got further than at its
# last crash begins anew to count.
BACKOFF_S = (0.0, 10.0, 60.0)

# Why a job is given back by a worker that ends.
STOPPED = "The worker was stopped; the job goes on when one is back."

_READ_AT_ONCE = 200


class JobQueue:
    """Everything that is known of jobs. Never loads a model framework. Raises `Unavailable` where Redis is gone."""

    def __init__(self, connection: Redis, registry: str) -> None:
        self._redis = connection
        self._beats = count()
        self._sender = secrets.token_hex(4)
        self.registry = registry
        self.store = JobStore(connection, registry)
        self.keys, self.line = self.store.keys, self.store.line

    # What clients ask.

    def enqueue(self, kind: Kind, spec: Spec, after: Sequence[str] = ()) -> JobRecord:
        """Puts a job at the end of the queue; one that comes `after` others may run when they have finished.

        Raises `NotFound` or `FailedPrecondition` if one of those does not exist or can finish no more, and
        `AlreadyExists` if a run has the same name.
        """
        for other in after:
            if self.get(other).state in (JobState.FAILED, JobState.CANCELLED):
                raise FailedPrecondition(f"The job {other} has not finished, so nothing can come after it.")
        job_id, now = secrets.token_hex(4), str(time.time())
        texts: dict[Any, Any] = {"kind": kind.value, "spec": spec.to_json(), "run": spec.run, "after": " ".join(after)}

        def add(pipeline: Pipeline) -> None:
            if kind is Kind.TRAIN:
                self._refuse_taken(spec.run)
            last: Any = pipeline.zrevrange(self.keys.jobs, 0, 0, withscores=True)
            place = last[0][1] + 1 if last else 1
            pipeline.multi()
            pipeline.hset(self.keys.job(job_id), mapping={**texts, "enqueued_at": now, "attempt": 1})
            pipeline.zadd(self.keys.jobs, {job_id: place})
            pipeline.zadd(self.keys.open, {job_id: place})
            self.store.tell(pipeline, job_id, [TimedEvent(StateChanged(JobState.QUEUED))], {})
            if not after:
                self.store.send(pipeline, job_id, 1, place)

        with reachable():
            while self._redis.exists(self.keys.job(job_id)):
                job_id = secrets.token_hex(4)
            self._redis.transaction(add, self.keys.jobs, self.line.rq.key)
        return self.get(job_id)

    def _refuse_taken(self, run: str) -> None:
        ids = [job_id.decode() for job_id in cast(list[bytes], self._redis.zrange(self.keys.jobs, 0, -1))]
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hmget(self.keys.job(job_id), ["run", "state", RunStarted.__name__])
        answers = pipeline.execute(raise_on_error=False)
        for job_id, answer in zip(ids, answers, strict=True):
            if isinstance(answer, Exception):
                continue  # what cannot be understood has no run
            name, state, started = answer
            never_ran = started is None and state in (b"failed", b"cancelled")
            if name == run.encode() and not never_ran:
                raise AlreadyExists(f"The job {job_id} has a run named {shown(run)} already; choose another name.")

    def get(self, job_id: str) -> JobRecord:
        """A job; raises `NotFound`."""
        (record,) = self.store.read([job_id]) if job_id.isalnum() and job_id.isascii() else (None,)
        if record is None:
            raise not_found(job_id)
        return record

    def jobs(
        self, states: Sequence[JobState] = (), kinds: Sequence[Kind] = (), before: int | None = None
    ) -> Iterator[JobRecord]:
        """Every job, or those of some states and kinds and before a place, the newest first; read as far as they are
        asked for."""
        open_only = bool(states) and not any(state.is_final for state in states)
        key = self.keys.open if open_only else self.keys.jobs
        with reachable():
            newest = "+inf" if before is None else f"({before}"
            found = cast(list[bytes], self._redis.zrevrangebyscore(key, newest, "-inf"))
        ids = [job_id.decode(errors="replace") for job_id in found]
        for start in range(0, len(ids), _READ_AT_ONCE):
            some = ids[start : start + _READ_AT_ONCE]
            records = self.store.read(some)
            # What ended long ago is gone, and its place is not needed any more.
            if gone := [job_id for job_id, record in zip(some, records, strict=True) if record is None]:
                with reachable():
                    self._redis.zrem(self.keys.jobs, *gone)
                    self._redis.zrem(self.keys.open, *gone)
            for record in records:
                if record and (not states or record.state in states) and (not kinds or record.kind in kinds):
                    yield record

    def cancel(self, job_id: str) -> JobRecord:
        """Asks a job to end: a waiting one ends now. Raises `NotFound`, or `FailedPrecondition` where it has ended."""

        self.get(job_id)

        def change(pipeline: Pipeline, fields: Fields) -> None:
            waiting = state_of(fields) is JobState.QUEUED
            state = JobState.CANCELLED if waiting else JobState.CANCELLING
            pipeline.hset(self.keys.job(job_id), "cancel", "1")
            self.store.tell(pipeline, job_id, [TimedEvent(StateChanged(state))], fields)

        if not self.store.change(job_id, None, change):
            raise FailedPrecondition(f"The job {job_id} is {self.get(job_id).state.value} already.")
        record = self.get(job_id)
        with reachable():
            self.line.remove(job_id, record.attempt)
        return record

    def read_events(self, job_id: str, after: str = "0", wait_s: float = 0.0) -> list[tuple[str, TimedEvent]]:
        """What a job told after an event's id, each with its id; waits so long where there is nothing new yet.

        In place of an event that cannot be understood there is a notice of that.
        """
        with reachable():
            block_ms = round(wait_s * 1000) or None
            answer: Any = self._redis.xread({self.keys.events(job_id): after}, count=1000, block=block_ms)
        if not answer:
            return []
        entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        return [(entry_id.decode(), _event(entry_id, values)) for entry_id, values in entries]

    # What an attempt says of itself.

    def tell(self, job_id: str, attempt: int, events: Sequence[TimedEvent], new_tokens: int = 0) -> bool:
        """Adds what an attempt told, and the tokens that it trained on meanwhile; False where there is a later one."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            self.store.tell(pipeline, job_id, events, fields)
            if new_tokens:
                pipeline.incrby(self.keys.tokens, new_tokens)

        return self.store.change(job_id, attempt, change)

    def is_current(self, job_id: str, attempt: int) -> bool:
        """Whether an attempt is the job's latest, and the job has not ended."""
        with reachable():
            held = cast(list[bytes | None], self._redis.hmget(self.keys.job(job_id), ["state", "attempt"]))
        fields = {name: (value or b"").decode() for name, value in zip(("state", "attempt"), held, strict=True)}
        state = state_of(fields)
        return state is not None and not state.is_final and attempt_of(fields) == attempt

    def cancel_requested(self, job_id: str) -> bool:
        """Whether somebody asked the job to end."""
        with reachable():
            return bool(self._redis.hexists(self.keys.job(job_id), "cancel"))

    def give_back(self, job_id: str, attempt: int, reason: str) -> bool:
        """Ends an attempt that was interrupted; the next one follows at once, and can be made by another worker."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if not self._ends_cancelled(pipeline, job_id, fields):
                self._next_attempt(pipeline, job_id, attempt, StateChanged(JobState.QUEUED, reason), 0.0, fields)

        return self.store.change(job_id, attempt, change)

    def lose(self, job_id: str, attempt: int, reason: str) -> bool:
        """Ends an attempt that crashed; the next one follows after a while, if there were not too many."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if self._ends_cancelled(pipeline, job_id, fields):
                return
            # What an attempt began with is what those before it have kept.
            started = last_told(RunStarted, fields)
            step = started.first_step if started else 0
            before = number_of(fields.get("crash_step", ""))
            further = before is None or step > before
            crashes = 1 if further else 1 + (number_of(fields.get("crashes", "")) or 0)
            pipeline.hset(self.keys.job(job_id), mapping={"crashes": crashes, "crash_step": step})
            if crashes > len(BACKOFF_S):
                event = StateChanged(JobState.FAILED, f"{reason}, too often without getting any further.")
                self.store.tell(pipeline, job_id, [TimedEvent(event)], fields)
            else:
                delay_s = BACKOFF_S[crashes - 1]
                when = f"in {delay_s:.0f} s" if delay_s else "now"
                event = StateChanged(JobState.QUEUED, f"{reason}. It goes on from its last state {when}.")
                self._next_attempt(pipeline, job_id, attempt, event, delay_s, fields)

        return self.store.change(job_id, attempt, change)

    def renew_job_lease(self, job_id: str, attempt: int, seconds: int = LEASE_S) -> None:
        """Says that an attempt makes progress; nothing happens where there is a later one."""
        lease = Lease(attempt, seconds, f"{self._sender}-{next(self._beats)}")

        def change(pipeline: Pipeline, _: Fields) -> None:
            pipeline.set(self.keys.lease(job_id), lease.to_text(), ex=seconds)

        self.store.change(job_id, attempt, change)

    # Workers.

    def renew_worker_lease(self, name: str) -> None:
        """Says that a worker lives."""
        with reachable():
            self._redis.sadd(self.keys.workers, name)
            self._redis.set(self.keys.worker(name), 1, ex=LEASE_S)

    def end_worker_lease(self, name: str) -> None:
        """Says that a worker is gone."""
        with reachable():
            self._redis.delete(self.keys.worker(name))
            self._redis.srem(self.keys.workers, name)

    def live_workers(self) -> int:
        """How many workers live."""
        with reachable():
            names = cast(set[bytes], self._redis.smembers(self.keys.workers))
            gone = [name for name in names if not self._redis.exists(self.keys.worker(name.decode()))]
            if gone:
                self._redis.srem(self.keys.workers, *gone)
        return len(names) - len(gone)

    # Figures.

    def waiting(self) -> int:
        """How many jobs wait for a worker, for others or for their next attempt."""
        return sum(job.state is JobState.QUEUED for job in self.store.open_jobs().values())

    def counts(self) -> dict[JobState, int]:
        """How many jobs are in each state."""
        with reachable():
            ids = cast(list[bytes], self._redis.zrange(self.keys.jobs, 0, -1))
            pipeline = self._redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hget(self.keys.job(job_id.decode(errors="replace")), "state")
            answers = pipeline.execute(raise_on_error=False)
        return {state: answers.count(state.value.encode()) for state in JobState}

    def tokens(self) -> int:
        """How many tokens all jobs ever trained on."""
        with reachable():
            value: Any = self._redis.get(self.keys.tokens)
        return int(value or 0)

    # How it is done.

    def _next_attempt(
        self, pipeline: Pipeline, job_id: str, attempt: int, event: StateChanged, delay_s: float, fields: Fields
    ) -> None:
        pipeline.hset(self.keys.job(job_id), mapping={"attempt": attempt + 1, "delay_s": delay_s})
        pipeline.delete(self.keys.lease(job_id))
        self.store.tell(pipeline, job_id, [TimedEvent(event)], fields)
        if not delay_s:
            self.store.send(pipeline, job_id, attempt + 1, self.store.place(job_id))

    def _ends_cancelled(self, pipeline: Pipeline, job_id: str, fields: Fields) -> bool:
        """Ends a job whose end somebody asked for, and which has no process any more that could do it."""
        if "cancel" in fields:
            self.store.tell(pipeline, job_id, [TimedEvent(StateChanged(JobState.CANCELLED))], fields)
        return "cancel" in fields


def _event(entry_id: bytes, values: dict[bytes, bytes]) -> TimedEvent:
    try:
        return TimedEvent.from_json(values.get(b"event", b""))
    except ValueError as error:
        # Redis begins the id of an entry with the time in milliseconds.
        moment = int(entry_id.partition(b"-")[0]) / 1000
        return TimedEvent(Notice(f"An event of this job cannot be understood: {shown(error, 160)}."), moment)
