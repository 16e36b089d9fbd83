"""Jobs in Redis: reads their records, events and leases, and changes them in transactions."""

import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline

from shared.errors import NotFound, shown
from trainer_service.jobs.events import (
    Evaluation,
    JobState,
    Notice,
    Preparation,
    Progress,
    RunStarted,
    StateChanged,
    TimedEvent,
)
from trainer_service.jobs.keys import Keys
from trainer_service.jobs.live_workers import LiveWorkers
from trainer_service.jobs.needs import awaited_worker
from trainer_service.jobs.records import BEST, Fields, JobRecord, Lease, attempt_of, last_event, read_record, state_of
from trainer_service.jobs.specs import Kind, Spec
from trainer_service.redis_client import reachable

WORKING = (JobState.RUNNING, JobState.CANCELLING)

# An attempt renews its lease about every second; one that has not renewed it for this long is gone.
LEASE_S = 8
# A starting process has longer until its first renewal.
START_LEASE_S = 30

_MAX_EVENTS = 100_000
# How long jobs that have ended are kept.
KEPT_S = 30 * 24 * 3600
_READ_AT_ONCE = 200
# Redis keeps tickets as floating-point numbers.
MAX_TICKET = 2**53


class JobStore:
    """The jobs of one registry, and its `workers`. Every method raises `Unavailable` if Redis does not answer.

    A change names the attempt that makes it, and is rejected if there is a later attempt: a process that lost its job
    but still runs changes nothing.
    """

    def __init__(self, connection: Redis, registry: str) -> None:
        self.redis = connection
        self.keys = Keys(registry)
        self.workers = LiveWorkers(connection, self.keys)
        self._beats = count()
        self._sender = secrets.token_hex(4)

    # Reading.

    def get(self, job_id: str) -> JobRecord:
        """Returns a job; raises `NotFound`."""
        (record,) = self.read([job_id]) if job_id.isalnum() and job_id.isascii() else (None,)
        if record is None:
            raise _not_found(job_id)
        return record

    def read(self, ids: Sequence[str]) -> list[JobRecord | None]:
        """Returns the records of jobs; None for those that no longer exist."""
        records = self.read_alone(ids)
        if any(record and record.state is JobState.QUEUED for record in records):
            return self._with_waits(records)
        return records

    def read_alone(self, ids: Sequence[str]) -> list[JobRecord | None]:
        """Returns the same without what other jobs and the workers say of a job that waits: `ahead` and `awaited`."""
        with reachable(self.redis):
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hgetall(self.keys.job(job_id))
                pipeline.get(self.keys.lease(job_id))
                pipeline.zscore(self.keys.jobs, job_id)
            answers = pipeline.execute(raise_on_error=False)
            # A key of another type hides its own job only.
            for answer in answers:
                if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
                    raise answer
        records: list[JobRecord | None] = []
        for job_id, held, lease, ticket in zip(ids, answers[::3], answers[1::3], answers[2::3], strict=True):
            fields = {"odd": str(held)} if isinstance(held, Exception) else _decoded(held)
            valid_lease = None if isinstance(lease, Exception) else Lease.from_text(lease)
            records.append(read_record(job_id, fields, ticket_of(ticket), valid_lease) if fields else None)
        return records

    def jobs(
        self, states: Sequence[JobState] = (), kinds: Sequence[Kind] = (), before: int | None = None
    ) -> Iterator[JobRecord]:
        """Yields the jobs, the newest first, and reads them as they are needed.

        `states` and `kinds` select jobs, and `before` leaves out those with this ticket or a higher one.
        """
        open_only = bool(states) and not any(state.is_final for state in states)
        key = self.keys.open if open_only else self.keys.jobs
        with reachable(self.redis):
            newest = "+inf" if before is None else f"({before}"
            found = cast(list[bytes], self.redis.zrevrangebyscore(key, newest, "-inf"))
        ids = [job_id.decode(errors="replace") for job_id in found]
        for start in range(0, len(ids), _READ_AT_ONCE):
            some = ids[start : start + _READ_AT_ONCE]
            records = self.read(some)
            # Jobs that ended long ago have expired.
            if gone := [job_id for job_id, record in zip(some, records, strict=True) if record is None]:
                with reachable(self.redis):
                    self.redis.zrem(self.keys.jobs, *gone)
                    self.redis.zrem(self.keys.open, *gone)
            for record in records:
                if record and (not states or record.state in states) and (not kinds or record.kind in kinds):
                    yield record

    def open_jobs(self) -> list[JobRecord]:
        """Returns the valid jobs that have not ended, ordered by their tickets."""
        with reachable(self.redis):
            ids = cast(list[bytes], self.redis.zrange(self.keys.open, 0, -1))
        records = self.read([job_id.decode(errors="replace") for job_id in ids])
        return [record for record in records if record and not record.state.is_final]

    def read_events(self, job_id: str, after: str = "0", wait_s: float = 0.0) -> list[tuple[str, TimedEvent]]:
        """Returns the events of a job that follow the event with the id `after`, each with its id.

        Waits up to `wait_s` for a new event. A notice replaces an invalid event.
        """
        with reachable(self.redis):
            block_ms = round(wait_s * 1000) or None
            answer: Any = self.redis.xread({self.keys.events(job_id): after}, count=1000, block=block_ms)
        if not answer:
            return []
        entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        return [(entry_id.decode(), _read_event(entry_id, values)) for entry_id, values in entries]

    def is_current(self, job_id: str, attempt: int) -> bool:
        """Whether an attempt is the latest one of its job, and the job has not ended."""
        (record,) = self.read([job_id])
        return record is not None and not record.state.is_final and record.attempt == attempt

    def cancel_requested(self, job_id: str) -> bool:
        """Whether the job was cancelled."""
        with reachable(self.redis):
            return bool(self.redis.hexists(self.keys.job(job_id), "cancel"))

    # Counting.

    def waiting(self) -> list[JobRecord]:
        """Returns the jobs that wait for a worker, for other jobs or for their next attempt."""
        return [job for job in self.open_jobs() if job.state is JobState.QUEUED]

    def counts(self) -> dict[JobState, int]:
        """Counts the jobs in each state."""
        with reachable(self.redis):
            ids = cast(list[bytes], self.redis.zrange(self.keys.jobs, 0, -1))
        states = self._states(ids)
        return {state: states.count(state.value.encode()) for state in JobState}

    def tokens(self) -> int:
        """Returns the number of tokens that all jobs ever trained on."""
        with reachable(self.redis):
            return _counted(self.redis.get(self.keys.tokens))

    def diverged(self) -> int:
        """Returns the number of jobs that ever failed because their loss was not finite."""
        with reachable(self.redis):
            return _counted(self.redis.get(self.keys.diverged))

    # Changing.

    def report(
        self, job_id: str, attempt: int, events: Sequence[TimedEvent], new_tokens: int = 0, diverged: bool = False
    ) -> bool:
        """Adds events of an attempt, the tokens that it trained on since, and whether its loss is no longer finite.

        Returns False if the attempt is over.
        """

        def change(pipeline: Pipeline, fields: Fields) -> None:
            self.add_events(pipeline, job_id, events, fields)
            if new_tokens:
                pipeline.incrby(self.keys.tokens, new_tokens)
            if diverged:
                pipeline.incr(self.keys.diverged)

        return self.change(job_id, attempt, change)

    def replace_spec(self, job_id: str, attempt: int, spec: Spec) -> None:
        """Gives a job another specification; does nothing if the attempt is over."""

        def change(pipeline: Pipeline, _: Fields) -> None:
            pipeline.hset(self.keys.job(job_id), "spec", spec.to_json())

        self.change(job_id, attempt, change)

    def change(
        self,
        job_id: str,
        attempt: int | None,
        change: Callable[[Pipeline, Fields], object],
        also_watch: Sequence[str] = (),
    ) -> bool:
        """Makes a change in one transaction, which is repeated if another client changes a watched key.

        Returns False, and changes nothing, if the job has ended, is at another attempt than `attempt`, or is invalid;
        raises `NotFound` if it does not exist.
        """
        key = self.keys.job(job_id)

        def apply(pipeline: Pipeline) -> bool:
            held: Any = pipeline.hgetall(key)
            fields = _decoded(held)
            if not fields:
                raise _not_found(job_id)
            state, latest = state_of(fields), attempt_of(fields)
            if state is None or state.is_final or attempt not in (None, latest):
                return False
            pipeline.multi()
            change(pipeline, fields)
            return True

        with reachable(self.redis):
            # redis-py's annotation omits that `transaction` returns the callable's value.
            run: Any = self.redis.transaction
            return bool(run(apply, key, *also_watch, value_from_callable=True))

    def add_events(self, pipeline: Pipeline, job_id: str, events: Sequence[TimedEvent], fields: Fields) -> None:
        """Adds events to a transaction, with the changes that they make to the job; `fields` are its current fields."""
        key, best = self.keys.job(job_id), last_event(Evaluation, fields, BEST)
        for timed in events:
            text, event = timed.to_json(), timed.event
            pipeline.xadd(self.keys.events(job_id), {"event": text}, maxlen=_MAX_EVENTS, approximate=True)
            if isinstance(event, Preparation | RunStarted | Progress | Evaluation):
                pipeline.hset(key, type(event).__name__, text)
            if isinstance(event, Evaluation) and (best is None or event.validation_loss < best.validation_loss):
                best = event
                pipeline.hset(key, BEST, text)
            if isinstance(event, StateChanged):
                pipeline.hset(key, mapping={"state": event.state.value, "reason": event.reason})
                if event.state is JobState.RUNNING:
                    pipeline.hsetnx(key, "started_at", str(timed.time))
                elif event.state.is_final:
                    pipeline.hset(key, "ended_at", timed.time)
                    pipeline.delete(self.keys.lease(job_id))
                    pipeline.zrem(self.keys.open, job_id)
                    for each in (key, self.keys.events(job_id)):
                        pipeline.expire(each, KEPT_S)

    # Leases: keys that expire unless their owner renews them.

    def renew_attempt(self, job_id: str, attempt: int, seconds: int = LEASE_S) -> None:
        """Renews the lease of an attempt that makes progress; does nothing if there is a later attempt."""

        def change(pipeline: Pipeline, _: Fields) -> None:
            self.lend(pipeline, job_id, attempt, seconds)

        self.change(job_id, attempt, change)

    def lend(self, pipeline: Pipeline, job_id: str, attempt: int, seconds: int) -> None:
        """Gives an attempt its lease, or renews it, as part of a transaction."""
        lease = Lease(attempt, seconds, f"{self._sender}-{next(self._beats)}")
        pipeline.set(self.keys.lease(job_id), lease.to_text(), ex=seconds)

    # Details.

    def _states(self, ids: Sequence[bytes]) -> list[object]:
        with reachable(self.redis):
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hget(self.keys.job(job_id.decode(errors="replace")), "state")
            return pipeline.execute(raise_on_error=False)

    def _with_waits(self, records: Sequence[JobRecord | None]) -> list[JobRecord | None]:
        """Fills in `awaited` of each queued job that is not suspended, and `ahead`: lower tickets, and higher ones at
        work."""
        offers = self.workers.offers()
        with reachable(self.redis):
            listed: Any = self.redis.zrange(self.keys.open, 0, -1, withscores=True)
        states = self._states([job_id for job_id, _ in listed])
        names = [state.value.encode() for state in WORKING]
        numbered = sorted((ticket_of(score), state in names) for (_, score), state in zip(listed, states, strict=True))
        numbered = [each for each in numbered if each[0]]
        tickets = [ticket for ticket, _ in numbered]
        working = [ticket for ticket, works in numbered if works]
        return [
            replace(
                record,
                ahead=bisect_left(tickets, record.ticket) + len(working) - bisect_right(working, record.ticket),
                awaited=awaited_worker(record.needs, offers),
            )
            if record and record.state is JobState.QUEUED and not record.is_suspended
            else record
            for record in records
        ]


def ticket_of(score: object) -> int:
    """Returns the ticket that a score in Redis stands for, and 0 if it is none."""
    return int(score) if isinstance(score, int | float) and 0 < score <= MAX_TICKET else 0


def _counted(value: Any) -> int:
    """Returns a count that Redis keeps, and 0 if it is none."""
    return int(value) if value and value.isdigit() and len(value) <= 19 else 0


def _not_found(job_id: str) -> NotFound:
    return NotFound(f"There is no job {shown(job_id)}; `gptloop jobs` lists those that exist.")


def _decoded(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in fields.items()}


def _read_event(entry_id: bytes, values: dict[bytes, bytes]) -> TimedEvent:
    try:
        return TimedEvent.from_json(values.get(b"event", b""))
    except ValueError as error:
        # Redis begins the id of an entry with the time in milliseconds.
        moment = int(entry_id.partition(b"-")[0]) / 1000
        return TimedEvent(Notice(f"An event of this job cannot be understood: {shown(error, 160)}."), moment)
