"""Submits jobs, and holds in the registry the version that a job names until the job has ended."""

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress

from shared.errors import FailedPrecondition, NotFound
from shared.registry.store import Registry
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import EvaluateSpec, RunSpec, Spec

logger = logging.getLogger(__name__)

# A hold is made under a temporary name until the job has an id; this is how long such a hold is kept.
_TEMPORARY_HOLD_S = 60.0


def submit(spec: Spec, queue: JobQueue, registry: Registry, after: Sequence[str] = ()) -> JobRecord:
    """Puts a job on the queue as `JobQueue.enqueue` does, and holds the version that it names.

    Raises the errors of `JobQueue.enqueue`, `NotFound` if that version, or the state that continues it, has been
    removed, and `FailedPrecondition` if the registry cannot be written.
    """
    number = _named_version(spec)
    if number is None:
        return queue.enqueue(spec, after)
    temporary = f"new-{secrets.token_hex(8)}"
    registry.holds.add(temporary, number)
    try:
        version = registry.version(number)
        if isinstance(spec, RunSpec) and version.step not in registry.states(version.run):
            raise NotFound(f"The state of version {number} was removed just now; continue another version.")
        record = queue.enqueue(spec, after)
    except BaseException:
        with suppress(FailedPrecondition):  # the hold expires by itself
            registry.holds.remove(temporary)
        raise
    try:
        registry.holds.hand_over(temporary, record.id)
    except FailedPrecondition as error:
        # The job is queued: an error would make the caller submit it again.
        logger.warning("job %s holds nothing, so version %d may be removed: %s", record.id, number, error)
    return record


def release_ended(queue: JobQueue, registry: Registry) -> None:
    """Removes the holds of jobs that have ended or no longer exist; raises `Unavailable` if Redis does not answer."""
    for job, age_s in registry.holds.ages_s().items():
        (record,) = queue.store.read([job])
        if record.state.is_final if record else age_s > _TEMPORARY_HOLD_S:
            registry.holds.remove(job)


def _named_version(spec: Spec) -> int | None:
    if isinstance(spec, RunSpec):
        return spec.resume
    return int(spec.version) if isinstance(spec, EvaluateSpec) and spec.version.isdecimal() else None
