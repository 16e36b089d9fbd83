"""The jobs of a registry as lines of JSON, which any Redis of any version can take in.

Leases and RQ's own keys are left out: a job that was at work begins its next attempt, and one that waited is handed to
the workers again.
"""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from shared.errors import FailedPrecondition
from trainer_service.backup.copied_jobs import checked_job, read_copy
from trainer_service.jobs.events import JobState, StateChanged, TimedEvent
from trainer_service.jobs.job_store import KEPT_S, WORKING, JobStore, ticket_of
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import attempt_of, seconds_of, state_of
from trainer_service.redis_client import reachable

RESTORED = "The job was restored from a backup; it resumes from its last state."

_EVENTS_AT_ONCE = 1000


def copy_jobs(store: JobStore) -> Iterator[bytes]:
    """Yields a line with the counters, and then a line for each job: its ticket, its fields and its events.

    Each job is read in one transaction. Raises `Unavailable` if Redis does not answer.
    """
    yield _line({"tokens": store.tokens(), "diverged": store.diverged()})
    with reachable(store.redis):
        tickets: Any = store.redis.zrange(store.keys.jobs, 0, -1, withscores=True)
    for job_id, ticket in tickets:
        name = job_id.decode(errors="replace")
        with reachable(store.redis), store.redis.pipeline() as pipeline:
            pipeline.hgetall(store.keys.job(name))
            pipeline.xrange(store.keys.events(name))
            fields, events = pipeline.execute(raise_on_error=False)
        # A job that has expired, or whose key another program has replaced, is left out, and so is what is no job.
        if isinstance(fields, dict) and fields and isinstance(events, list):
            job = {
                "id": name,
                "ticket": ticket_of(ticket),
                "fields": _texts(fields),
                "events": [[entry.decode(), _texts(values)] for entry, values in events],
            }
            with suppress(ValueError):
                yield _line(checked_job(job))


def restore_jobs(queue: JobQueue, lines: Iterable[bytes], digest: str) -> None:
    """Puts the jobs of `copy_jobs` into a Redis that has none of this registry.

    They appear all at once, at the end; what a killed restoration has left is replaced. `digest` names the backup:
    nothing is done if all of it is there already. Raises `FailedPrecondition` if Redis has jobs of this registry, or if
    a line is not one of `copy_jobs`; then nothing is written.
    """
    counters, jobs = read_copy(lines)
    store, keys = queue.store, queue.store.keys
    with reachable(store.redis):
        if store.redis.get(keys.restored) == digest.encode():
            return
        if store.redis.exists(keys.jobs):
            raise FailedPrecondition(
                "Redis has jobs of this registry already: restore into an empty Redis, or another database."
            )
        handed = []
        for job in sorted(jobs, key=lambda each: each["ticket"]):
            if _write(store, job):
                handed.append(job)

        def appear(pipeline: Any) -> None:
            pipeline.multi()
            pipeline.set(keys.restored, digest)
            for name in ("tokens", "diverged"):
                if counters[name]:
                    pipeline.set(getattr(keys, name), counters[name])
            for job in jobs:
                pipeline.zadd(keys.jobs, {job["id"]: job["ticket"]})
                if not _is_final(job["fields"]):
                    pipeline.zadd(keys.open, {job["id"]: job["ticket"]})
            for job in handed:
                queue.attempts.insert(pipeline, job["id"], int(job["fields"]["attempt"]), job["ticket"])

        store.redis.transaction(appear, keys.jobs, queue.attempts.key)


def _is_final(fields: dict[str, str]) -> bool:
    """Whether the fields are those of a job that has ended, or that cannot be read and never will."""
    state = state_of(fields)
    return state is None or state.is_final


def _write(store: JobStore, job: dict[str, Any]) -> bool:
    """Writes a job and its events; returns whether the workers were given its attempt, and have to be again."""
    key, events_key = store.keys.job(job["id"]), store.keys.events(job["id"])
    fields, state = job["fields"], state_of(job["fields"])
    was_sent = state is JobState.QUEUED and attempt_of(fields, "sent") == attempt_of(fields)
    events = [(entry, _bytes(values)) for entry, values in job["events"]]
    if state in WORKING:
        was_sent = True
        event = StateChanged(JobState.QUEUED, RESTORED)
        fields |= {"attempt": str((attempt_of(fields) or 0) + 1), "state": event.state.value, "reason": event.reason}
        events.append(("*", {b"event": TimedEvent(event).to_json().encode()}))
    store.redis.delete(key, events_key)
    for start in range(0, len(events), _EVENTS_AT_ONCE):
        with store.redis.pipeline(transaction=False) as pipeline:
            for entry, values in events[start : start + _EVENTS_AT_ONCE]:
                pipeline.xadd(events_key, values, id=entry)
            pipeline.execute()
    store.redis.hset(key, mapping=_bytes(fields))
    if state is not None and state.is_final:
        left_s = min(max(1, round((seconds_of(fields, "ended_at") or 0.0) + KEPT_S - time.time())), KEPT_S)
        for each in (key, events_key):
            store.redis.expire(each, left_s)
    return was_sent


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _texts(fields: dict[bytes, bytes]) -> dict[str, str]:
    # Other programs may have written bytes that are no text: they stay what they are.
    return {
        key.decode(errors="surrogateescape"): value.decode(errors="surrogateescape") for key, value in fields.items()
    }


def _bytes(fields: dict[str, str]) -> dict[Any, Any]:
    return {
        key.encode(errors="surrogateescape"): value.encode(errors="surrogateescape") for key, value in fields.items()
    }
