"""Submits jobs, and holds in the registry the versions that a job names until the job has ended."""

import logging
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shared.errors import DataError, FailedPrecondition, NotFound
from shared.registry.decisions import run_label, run_of
from shared.registry.numbering import is_number
from shared.registry.registry import Registry
from shared.service.log_ids import with_ids
from trainer_service.jobs.job_store import JobStore
from trainer_service.jobs.local_files import place_of, sizes_bytes
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import EvaluateSpec, RunSpec, Spec, StoriesSpec, TrainSpec
from trainer_service.teachers import find
from trainer_service.text.story_set import read_story_set

logger = logging.getLogger(__name__)

# A hold is made under a temporary name until the job has an id; this is how long such a hold is kept.
_TEMPORARY_HOLD_S = 60.0


def submit(spec: Spec, queue: JobQueue, registry: Registry, after: Sequence[str] = ()) -> JobRecord:
    """Puts a job on the queue as `JobQueue.enqueue` does, and holds the versions that it names.

    Raises the errors of `JobQueue.enqueue`, `NotFound` if one of them, or the state that continues it, has been
    removed, and `FailedPrecondition` if the registry cannot be written.
    """
    names = _held_names(spec)
    if not names:
        return queue.enqueue(spec, after)
    temporary = f"new-{secrets.token_hex(8)}"
    registry.holds.add(temporary, *names)
    try:
        _require_present(spec, registry)
        record = queue.enqueue(spec, after)
    except BaseException:
        with suppress(FailedPrecondition):  # the hold expires by itself
            registry.holds.remove(temporary)
        raise
    try:
        registry.holds.hand_over(temporary, record.id)
    except FailedPrecondition as error:
        # The job is queued: an error would make the caller submit it again.
        logger.warning(
            "job %s holds nothing, so %s may be removed: %s",
            *(record.id, ", ".join(names), error),
            extra=with_ids(job=record.id),
        )
    return record


def on_this_machine(
    spec: Spec, after: Sequence[str], directory: Path, store: JobStore, count: int | None = None
) -> Spec:
    """Returns a job with what it finds on the machine that queues it.

    These are the sizes of its files; the folder of data, `directory`, if the job needs what a large teacher was paid
    for; and how many stories it reads if it is a run on a set of them, whatever the set gains. That is `count`, the
    number of another run which has to read the same stories, or else the number that the set has now, or that a job
    before this one brings it to. Raises `NotFound` or `DataError` if the set has none and none are coming, or if a file
    cannot be read, and `FailedPrecondition` if `directory` cannot be written.
    """
    spec = replace(spec, file_sizes=sizes_bytes(spec.files))
    asks = isinstance(spec, StoriesSpec) or (isinstance(spec, EvaluateSpec) and spec.judge_usd > 0)
    if asks or spec.data.story_set:
        # Limits hold for what the ledgers of one folder say.
        spec = replace(spec, place=place_of(directory))
    name = spec.data.story_set
    if not name:
        return spec
    coming = _coming_stories(name, after, store)
    try:
        present = len(read_story_set(directory, name).stories)
    except (NotFound, DataError):
        if not coming:
            raise
        present = 0
    return replace(spec, stories=count or max(present, coming)) if isinstance(spec, RunSpec) else spec


def _coming_stories(name: str, after: Sequence[str], store: JobStore) -> int:
    """Returns how many stories some jobs, and those before them, want in a set; 0 if none asks for any."""
    most, seen, left = 0, set[str](), {job for job in after if job.isascii()}
    while left:
        seen |= left
        records = [record for record in store.read(sorted(left)) if record]
        specs = [record.spec for record in records]
        most = max([most, *(each.count for each in specs if isinstance(each, StoriesSpec) and each.name == name)])
        left = {job for record in records for job in record.after} - seen
    return most


def settle(queue: JobQueue, registry: Registry, job: str, attempt: int, spec: EvaluateSpec) -> None:
    """Makes a specification that names versions by their numbers that of a job, and holds these versions.

    Raises `Unavailable` if Redis does not answer, and `FailedPrecondition` if the registry cannot be written.
    """
    if queue.store.get(job).spec != spec:
        registry.holds.add(job, *_held_names(spec))
        queue.store.replace_spec(job, attempt, spec)


def release_ended(queue: JobQueue, registry: Registry) -> None:
    """Removes the holds of jobs that have ended or no longer exist; raises `Unavailable` if Redis does not answer."""
    for job, age_s in registry.holds.ages_s().items():
        (record,) = queue.store.read([job])
        if record.state.is_final if record else age_s > _TEMPORARY_HOLD_S:
            registry.holds.remove(job)


def _held_names(spec: Spec) -> list[str]:
    """Returns the numbers of versions and the labels of runs that a job names.

    The other labels need no hold, because they protect their versions by themselves.
    """
    names: set[str] = set()
    if isinstance(spec, RunSpec):
        names = {each.version for each in spec.teachers}
        if spec.resume is not None:
            names.add(str(spec.resume))
        if isinstance(spec, TrainSpec) and spec.until is not None:
            names.add(run_label(spec.run))  # what it has reached, however long it waits there
    elif isinstance(spec, EvaluateSpec):
        names = {spec.version, *spec.rivals.values()}
    return sorted(name for name in names if is_number(name) or run_of(name))


def _require_present(spec: Spec, registry: Registry) -> None:
    """Raises `NotFound` if something that a job names has been removed since the job was described."""
    if isinstance(spec, RunSpec):
        if spec.resume is not None:
            version = registry.version(spec.resume)
            if version.step not in registry.states(version.run):
                raise NotFound(f"The state of version {spec.resume} was removed just now; continue another version.")
        for teacher in spec.teachers:
            if is_number(teacher.version):
                find(teacher, registry, spec.resume)
    else:
        for name in filter(is_number, _held_names(spec)):
            registry.version(int(name))
