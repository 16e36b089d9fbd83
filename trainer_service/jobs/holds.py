"""Jobs that name a version: it is held in the registry from before they are enqueued until they have ended."""

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress

from shared.errors import FailedPrecondition, NotFound
from shared.registry.store import Registry
from trainer_service.jobs.kinds import EvaluationSpec, Kind, Spec
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord

logger = logging.getLogger(__name__)

# Whoever enqueues a job holds its version under another name until the job has an id.
_YOUNG_S = 60.0


def enqueue(queue: JobQueue, registry: Registry, kind: Kind, spec: Spec, after: Sequence[str] = ()) -> JobRecord:
    """Puts a job on the queue, as `JobQueue.enqueue` does, and holds the version that it names.

    Raises `NotFound` if that version or the state that continues it was removed just now, and `FailedPrecondition` if
    the registry cannot be written.
    """
    number = _named_version(spec)
    if number is None:
        return queue.enqueue(kind, spec, after)
    coming = f"new-{secrets.token_hex(8)}"
    registry.holds.add(coming, number)
    try:
        version = registry.version(number)
        if not isinstance(spec, EvaluationSpec) and version.step not in registry.states(version.run):
            raise NotFound(f"The state of version {number} was removed just now; continue another version.")
        record = queue.enqueue(kind, spec, after)
    except BaseException:
        with suppress(FailedPrecondition):  # it lapses by itself
            registry.holds.remove(coming)
        raise
    try:
        registry.holds.hand_over(coming, record.id)
    except FailedPrecondition as error:
        # The job is queued, and who asked for it must not ask again.
        logger.warning("nothing is held for job %s, so version %d may be removed: %s", record.id, number, error)
    return record


def release_ended(queue: JobQueue, registry: Registry) -> None:
    """Gives back what is held for jobs that have ended, or are gone; raises `Unavailable` if Redis does not answer."""
    for job, age_s in registry.holds.ages_s().items():
        if _has_ended(queue, job, age_s):
            registry.holds.remove(job)


def _has_ended(queue: JobQueue, job: str, age_s: float) -> bool:
    try:
        return queue.get(job).state.is_final
    except NotFound:
        return age_s > _YOUNG_S


def _named_version(spec: Spec) -> int | None:
    if not isinstance(spec, EvaluationSpec):
        return spec.resume
    return int(spec.version) if spec.version.isdecimal() else None
