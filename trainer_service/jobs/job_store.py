"""Jobs as Redis holds them: how they are read, and how one is changed in a transaction."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ResponseError

from shared.errors import NotFound, shown
from trainer_service.jobs.events import Evaluation, JobState, Progress, RunStarted, StateChanged, TimedEvent
from trainer_service.jobs.keys import Keys
from trainer_service.jobs.line import Line
from trainer_service.jobs.reachable import reachable
from trainer_service.jobs.records import BEST, Fields, JobRecord, attempt_of, last_told, read_record, state_of

_KEPT_EVENTS = 100_000
# Of jobs that ended, for so long.
_KEPT_S = 30 * 24 * 3600
_WORKING = (JobState.RUNNING, JobState.CANCELLING)


@dataclass(frozen=True)
class Lease:
    """What an attempt says while it makes progress: for how long that counts, and a beat that no other renewal has."""

    attempt: int
    seconds: int
    beat: str

    def to_text(self) -> str:
        """As Redis holds it."""
        return f"{self.attempt} {self.seconds} {self.beat}"

    @classmethod
    def from_text(cls, text: bytes | None) -> "Lease | None":
        """The inverse of `to_text`; None if there is none, or none that can be understood."""
        parts = (text or b"").decode(errors="replace").split()
        if len(parts) != 3 or not (parts[0].isdecimal() and parts[1].isdecimal()) or len(parts[0] + parts[1]) > 18:
            return None
        return cls(int(parts[0]), int(parts[1]), parts[2])


@dataclass(frozen=True)
class OpenJob:
    """A job that has not ended. `lease` is that of its latest attempt; one of an earlier attempt is none."""

    fields: Fields
    state: JobState
    attempt: int
    lease: Lease | None

    @property
    def is_sent(self) -> bool:
        """Whether the latest attempt was put into the line."""
        return attempt_of(self.fields, "sent") == self.attempt


class JobStore:
    """Reads and changes jobs. Raises `Unavailable` where Redis does not answer."""

    def __init__(self, connection: Redis, registry: str) -> None:
        self.redis = connection
        self.keys = Keys(registry)
        self.line = Line(connection, self.keys)

    def read(self, ids: Sequence[str]) -> list[JobRecord | None]:
        """The records of jobs; None for those that are gone."""
        records: list[JobRecord | None] = []
        for job_id, (fields, lease, place) in zip(ids, self._read_each(ids), strict=True):
            if not fields:
                records.append(None)
                continue
            held = lease is not None and lease.attempt == attempt_of(fields)
            records.append(read_record(job_id, fields, place, held))
        if any(record and record.state is JobState.QUEUED for record in records):
            return self._with_ahead(records)
        return records

    def _read_each(self, ids: Sequence[str]) -> list[tuple[Fields, Lease | None, int]]:
        """The fields, the lease and the place of jobs."""
        with reachable():
            pipeline = self.redis.pipeline(transaction=False)
            for job_id in ids:
                pipeline.hgetall(self.keys.job(job_id))
                pipeline.get(self.keys.lease(job_id))
                pipeline.zscore(self.keys.jobs, job_id)
            answers = pipeline.execute(raise_on_error=False)
            # A key of another type than this program's hides nothing but its own job.
            for answer in answers:
                if isinstance(answer, Exception) and not _is_of_another_type(answer):
                    raise answer
        found = []
        for held, lease, place in zip(answers[::3], answers[1::3], answers[2::3], strict=True):
            fields = {"odd": str(held)} if isinstance(held, Exception) else _decoded(held)
            understood = None if isinstance(lease, Exception) else Lease.from_text(lease)
            found.append((fields, understood, int(place or 0)))
        return found

    def _with_ahead(self, records: Sequence[JobRecord | None]) -> list[JobRecord | None]:
        """The same, with how many jobs come before each that is queued: those of earlier places, and those at work."""
        with reachable():
            listed: Any = self.redis.zrange(self.keys.open, 0, -1, withscores=True)
            pipeline = self.redis.pipeline(transaction=False)
            for job_id, _ in listed:
                pipeline.hget(self.keys.job(job_id.decode(errors="replace")), "state")
            answers = pipeline.execute(raise_on_error=False)
        names = [state.value.encode() for state in _WORKING]
        places = [int(place) for _, place in listed]
        working = [place for place, state in zip(places, answers, strict=True) if state in names]
        return [
            replace(
                record,
                ahead=bisect_left(places, record.place) + len(working) - bisect_right(working, record.place),
            )
            if record and record.state is JobState.QUEUED
            else record
            for record in records
        ]

    def open_jobs(self) -> dict[str, OpenJob]:
        """The jobs that have not ended, by their place, without those that cannot be understood."""
        with reachable():
            ids: Any = self.redis.zrange(self.keys.open, 0, -1)
        names = [job_id.decode(errors="replace") for job_id in ids]
        found = {}
        for job_id, (fields, lease, _) in zip(names, self._read_each(names), strict=True):
            state, attempt = state_of(fields), attempt_of(fields)
            if state is not None and attempt is not None and "after" in fields:
                held = lease if lease is not None and lease.attempt == attempt else None
                found[job_id] = OpenJob(fields, state, attempt, held)
        return found

    def change(self, job_id: str, attempt: int | None, change: Callable[[Pipeline, Fields], object]) -> bool:
        """Makes a change in one transaction, unless the job has ended, is at another attempt, or cannot be understood;
        raises `NotFound`."""
        key = self.keys.job(job_id)

        def apply(pipeline: Pipeline) -> bool:
            held: Any = pipeline.hgetall(key)
            fields = _decoded(held)
            if not fields:
                raise not_found(job_id)
            state, latest = state_of(fields), attempt_of(fields)
            if state is None or state.is_final or latest is None or attempt not in (None, latest):
                return False
            pipeline.multi()
            change(pipeline, {**fields, "id": job_id})
            return True

        with reachable():
            # Its annotation leaves out that it returns what the callable does.
            run: Any = self.redis.transaction
            return bool(run(apply, key, self.line.rq.key, value_from_callable=True))

    def tell(self, pipeline: Pipeline, job_id: str, events: Sequence[TimedEvent], fields: Fields) -> None:
        """Adds events to a transaction, and what follows from them for the job, whose fields were these before."""
        key, best = self.keys.job(job_id), last_told(Evaluation, fields, BEST)
        for timed in events:
            text, event = timed.to_json(), timed.event
            pipeline.xadd(self.keys.events(job_id), {"event": text}, maxlen=_KEPT_EVENTS, approximate=True)
            if isinstance(event, RunStarted | Progress | Evaluation):
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
                        pipeline.expire(each, _KEPT_S)

    def send(self, pipeline: Pipeline, job_id: str, attempt: int, place: float) -> None:
        """Puts an attempt into the line, as part of a transaction."""
        self.line.insert(pipeline, job_id, attempt, place)
        pipeline.hset(self.keys.job(job_id), "sent", attempt)

    def place(self, job_id: str) -> float:
        """The place that a job has among all."""
        with reachable():
            place: Any = self.redis.zscore(self.keys.jobs, job_id)
        return float(place or 0)


def not_found(job_id: str) -> NotFound:
    """The error of a job that does not exist."""
    return NotFound(f"There is no job {shown(job_id)}; `gptloop jobs` lists those that exist.")


def _is_of_another_type(error: Exception) -> bool:
    return isinstance(error, ResponseError) and str(error).startswith("WRONGTYPE")


def _decoded(fields: dict[bytes, bytes]) -> Fields:
    return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in fields.items()}
