"""The ids that log lines carry: of the call, the job, the run and the version that a task works on.

They follow a task to the tasks that it starts and to `asyncio.to_thread`, but not to other threads, whose lines name
what they concern.
"""

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

# The name in gRPC metadata and in HTTP headers.
REQUEST_ID = "x-request-id"
_REQUEST_ID = re.compile(r"[!-Z\\^-~]{1,128}")


@dataclass(eq=False)
class Work:
    """What a task works on, by the names of its ids, and how many tokens a call has generated."""

    ids: dict[str, str | int] = field(default_factory=dict)
    generated_tokens: int = 0


_current: ContextVar[Work | None] = ContextVar("work", default=None)


def current_ids() -> dict[str, str | int]:
    """Returns the ids of this task."""
    work = _current.get()
    return {} if work is None else work.ids


@contextmanager
def about(**ids: str | int) -> Iterator[Work]:
    """Adds ids to the log lines of a block, and of the tasks that it starts."""
    work = Work({**current_ids(), **ids})
    token = _current.set(work)
    try:
        yield work
    finally:
        _current.reset(token)


def note(generated_tokens: int = 0, **ids: str | int) -> None:
    """Adds ids and tokens to the innermost block of `about`, if there is one."""
    if (work := _current.get()) is not None:
        work.ids.update(ids)
        work.generated_tokens += generated_tokens


def keep(**ids: str | int) -> None:
    """Adds ids to the log lines of the rest of this task, and of its blocks of `about`."""
    _current.set(Work({**current_ids(), **ids}))


def with_ids(**ids: str | int) -> dict[str, Mapping[str, str | int]]:
    """Returns the argument `extra` of a log call, so that its line has these ids."""
    return {"ids": ids}


def request_id_of(given: str | bytes | None) -> str:
    """Returns the request id that a client sent if it can stand in a log line, and otherwise a new one.

    Spaces and brackets cannot, with which it could pretend that the line has other ids, such as another caller.
    """
    return given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
