"""Reads the jobs of a backup, and checks what Redis and the services rely on before anything is written.

What a job says in its fields is not judged here: the services show a job that they do not understand as failed, in a
backup as in the Redis that it comes from.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from shared.errors import FailedPrecondition, shown
from shared.text import excerpt
from trainer_service.backup.archive import JOBS_NAME
from trainer_service.jobs.job_store import MAX_TICKET

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_EVENT_ID = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")
# Redis counts up to here.
_MAX_COUNT = (1 << 63) - 1


def read_copy(lines: Iterable[bytes]) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Returns the counters and the jobs of a backup; raises `FailedPrecondition`, which names the first wrong line."""
    counters: dict[str, int] = {}
    jobs: dict[str, dict[str, Any]] = {}
    number = 1
    try:
        for number, line in enumerate(lines, 1):
            values = json.loads(line)
            if type(values) is not dict:
                raise ValueError("it is not an object")
            if number == 1:
                counters = {name: _number(values, name, 0, _MAX_COUNT) for name in ("tokens", "diverged")}
                continue
            job = checked_job(values)
            if job["id"] in jobs:
                raise ValueError(f"the job {job['id']} is there twice")
            jobs[job["id"]] = job
        if not counters:
            raise ValueError("there is none")
    except KeyError as error:
        raise _refusal(number, f"it has no {error}") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(number, excerpt(error, 160)) from None
    return counters, list(jobs.values())


def _refusal(number: int, reason: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"The backup cannot be restored: line {number} of {JOBS_NAME} is none that `gptloop backup` writes: {reason}."
    )


def checked_job(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a job as a backup has it; raises `ValueError`, or `KeyError`, if no restoration would accept it."""
    job_id, events = values["id"], values["events"]
    if type(job_id) is not str or not _JOB_ID.fullmatch(job_id):
        raise ValueError(f"id is {shown(job_id, 40)}")
    if type(events) is not list:
        raise ValueError(f"events is {shown(events, 40)}")
    last = (0, 0)
    for event in events:
        if type(event) is not list or len(event) != 2 or type(event[0]) is not str:
            raise ValueError(f"an event is {shown(event, 40)}")
        found = _EVENT_ID.fullmatch(event[0])
        if found is None or (at := (int(found[1]), int(found[2]))) <= last:
            raise ValueError(f"the event {shown(event[0], 40)} does not follow the one before it")
        last = at
        _check_texts(event[1], "an event")
    _check_texts(values["fields"], "fields")
    ticket = _number(values, "ticket", 1, MAX_TICKET)
    return {"id": job_id, "ticket": ticket, "fields": values["fields"], "events": events}


def _check_texts(values: Any, name: str) -> None:
    if type(values) is not dict or not values or any(type(value) is not str for value in values.values()):
        raise ValueError(f"{name} is {shown(values, 40)}")
    for text in (*values, *values.values()):
        try:
            text.encode(errors="surrogateescape")
        except UnicodeEncodeError:
            raise ValueError(f"{name} has {shown(text, 40)}, which no program can write") from None


def _number(values: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    value = values[name]
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{name} is {shown(value, 40)}, but must be a number from {lowest} to {highest}")
    return value
