"""Runs one rank of a training job: `python -m trainer_service rank JOB [ATTEMPT]`, under any launcher."""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from shared.device import accelerator
from shared.device.accelerator import Accelerator
from shared.errors import FailedPrecondition, GptloopError, InvalidArgument, Unavailable, shown
from shared.service import logs, traces
from shared.service.reader import end_without_reader
from trainer_service.job_process import Assignment, Termination, work_on
from trainer_service.jobs.attempt import Attempt, Stopped, preparation_report
from trainer_service.jobs.claim import claim_when_due
from trainer_service.jobs.events import Event, JobState
from trainer_service.jobs.job_store import START_LEASE_S
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.specs import Kind, TrainSpec, spec_from_json
from trainer_service.ranks.meeting import Dismissed, Meeting
from trainer_service.ranks.place import INDEX_VARIABLE, Place, find_place
from trainer_service.ranks.watchdog import EXIT_CODE
from trainer_service.redis_client import connect
from trainer_service.settings import TrainerSettings, read_settings

logger = logging.getLogger(__name__)

# The exit code if the job has failed. NCCL ends a process that has lost a peer with the code 1.
FAILED_CODE = 3
# `PR_SET_PDEATHSIG` of prctl(2).
_PARENT_DEATH_SIGNAL = 1


def run_rank(job: str, attempt: int | None) -> int:
    """Works on a job as the rank that the environment says, and returns the exit code of the process.

    With an attempt, a coordinator has started this rank, and reports its failures; without one, rank 0 takes the job
    from the queue as soon as it waits. The code of rank 0 is 0 if the job has finished or was cancelled, 3 if it has
    failed, and 75 if another attempt has to follow: a launcher then ends the other ranks, which may wait for rank 0
    for ever. The code of another rank is the same, but 0 with an attempt unless the rank itself failed. Raises
    `InvalidArgument` if the environment does not say which rank this is.
    """
    terminated = Termination()
    try:
        place = find_place(os.environ)
    except InvalidArgument as error:
        _tell(str(error))
        raise
    logs.configure("trainer", more_ids=traces.ids, job=job, rank=str(place.rank))
    if attempt is not None:
        _end_with_parent()
    if place.local_rank is not None:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(place.local_rank))
    settings = read_settings(os.environ)
    code = 1
    try:
        code = (_lead if place.rank == 0 else _follow)(place, settings, job, attempt, terminated)
    except GptloopError as error:
        logger.error("%s", error)
        _tell(str(error))
        code = EXIT_CODE if isinstance(error, Unavailable) else FAILED_CODE
    except Exception as error:
        logger.exception("the rank failed")
        _tell(f"{type(error).__name__}: {shown(error, 200)}")
    if code:
        # MLX would wait for its peers, which may be gone.
        logging.shutdown()
        os._exit(code)
    return code


def _lead(place: Place, settings: TrainerSettings, job: str, given: int | None, terminated: Termination) -> int:
    traces.start("trainer")
    queue = JobQueue(connect(settings.redis), settings.open_registry().store.id())
    attempt = given
    if attempt is None:
        try:
            attempt = claim_when_due(queue, job, terminated)
        except FailedPrecondition as error:
            logger.warning("%s", error)
            code = _code_of(queue, job)
            if place.meeting:
                Meeting(place, job, None).dismiss(str(error), code)
            return code
    if attempt is None:
        return EXIT_CODE
    assignment = Assignment(
        queue=queue,
        settings=settings,
        job=job,
        attempt=attempt,
        worker=os.getppid(),
        terminated=terminated,
        join=partial(_join_as_first, place, queue, job),
        is_coordinated=given is not None,
    )
    work_on(assignment)
    return _code_of(queue, job)


def _code_of(queue: JobQueue, job: str) -> int:
    codes = {JobState.FINISHED: 0, JobState.CANCELLED: 0, JobState.FAILED: FAILED_CODE}
    return codes.get(queue.store.get(job).state, EXIT_CODE)


def _join_as_first(place: Place, queue: JobQueue, job: str, spec: TrainSpec, attempt: Attempt) -> Any:
    """Joins the ranks and tells them what to do; raises `FailedPrecondition` if the job has another number of them."""
    addresses = []
    if place.meeting and place.count > 1:
        report = preparation_report(attempt)
        meeting = Meeting(place, job, attempt.number)
        addresses = meeting.hold(lambda count: report("waiting for the other ranks", count / place.count))
    # MLX lets no other thread run while it connects, so the lease is not renewed.
    queue.store.renew_attempt(job, attempt.number, START_LEASE_S)
    ranks = _join(place, attempt.device, addresses)
    if ranks.count != spec.config.world_size:
        started = "1 rank was" if ranks.count == 1 else f"{ranks.count} ranks were"
        sentence = f"The job has world_size {spec.config.world_size}, but {started} started."
        ranks.share(json.dumps({"over": sentence}))
        raise FailedPrecondition(sentence)
    ranks.share(json.dumps({"attempt": attempt.number, "spec": spec.to_json()}))
    return ranks


def _follow(place: Place, settings: TrainerSettings, job: str, given: int | None, terminated: Termination) -> int:
    device = accelerator.prepare(settings.directories.cache / "trainer")
    # Imported before the meeting, so that no other rank waits for it.
    from trainer_service.ranks.follower import Follower

    def check(_: int) -> None:
        if terminated():
            raise Stopped

    code = 0 if given is not None else EXIT_CODE
    try:
        addresses = Meeting(place, job, given).attend(check) if place.meeting else []
        ranks = _join(place, device, addresses)
        facts = json.loads(ranks.share())
        if "over" in facts:
            logger.error("%s", facts["over"])
            return code
        spec = spec_from_json(Kind.TRAIN, facts["spec"])
        assert isinstance(spec, TrainSpec)
        attempt = Attempt(
            *(facts["attempt"], settings.directories, settings.retention, device, _drop, terminated),
            best_by=settings.best_by,
            job=job,
        )
        return 0 if Follower(spec, attempt, ranks).train() else code
    except Dismissed as dismissed:
        return dismissed.code if given is None else 0
    except Stopped:
        return code


def _join(place: Place, device: Accelerator, addresses: list[str]) -> Any:
    """Joins the group of MLX; returns `Ranks`."""
    from trainer_service.training.ranks import Ranks

    if place.count == 1:
        return Ranks.alone()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(place.variables(device.backend, addresses, Path(folder)))
        return Ranks.join()


def _drop(_: Event) -> None:
    """Rank 0 reports the same."""


def _tell(sentence: str) -> None:
    """Tells the coordinator why this rank ends."""
    print(sentence, flush=True)


def _end_with_parent() -> None:
    """Ends this process with the one that started it, even while it is stopped or waits inside MLX."""
    end_without_reader()
    if sys.platform == "linux" and INDEX_VARIABLE in os.environ:
        # A coordinator on this machine; the parent of another launcher may be a thread that ends before its process.
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
