"""Runs an attempt at a job in its own process: `python -m trainer_service.job_process JOB ATTEMPT WORKER`."""

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from shared.device import accelerator
from shared.errors import (
    FailedPrecondition,
    GptloopError,
    RankLost,
    RunOwnershipLost,
    StoreFailed,
    TrainingDiverged,
    Unavailable,
    UnreadableCheckpoint,
    shown,
)
from shared.service import logs, traces
from shared.service.log_ids import about
from trainer_service.jobs.attempt import Attempt, Paused, Stopped, Suspended
from trainer_service.jobs.events import JobState, StateChanged, TimedEvent
from trainer_service.jobs.local_files import require_same
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.reporter import Reporter
from trainer_service.jobs.specs import EvaluateSpec, PrepareSpec, RunSpec, StoriesSpec, TrainSpec
from trainer_service.jobs.submit import release_ended, settle
from trainer_service.ranks.coordinator import commands, run_ranks, visible_gpus
from trainer_service.redis_client import connect
from trainer_service.settings import TrainerSettings, read_settings

if TYPE_CHECKING:
    from trainer_service.training.ranks import Ranks

logger = logging.getLogger(__name__)

# Limits the message of a library.
_REASON_LENGTH = 400


class Termination:
    """Whether SIGTERM or SIGINT has asked this process to end after its step. It handles the signals from now on."""

    def __init__(self) -> None:
        self._requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, _signal: int, _frame: object) -> None:
        self._requested = True

    def __call__(self) -> bool:
        """Returns whether the process has to end."""
        return self._requested


def _alone(_spec: TrainSpec, _attempt: Attempt) -> "Ranks":
    from trainer_service.training.ranks import Ranks

    return Ranks.alone()


@dataclass(frozen=True)
class Assignment:
    """An attempt that this process works on.

    worker: the pid of the process that started this one.
    join: joins the ranks of a training job, of which this process is the first.
    is_coordinated: whether a coordinator reports that a rank was lost.
    """

    queue: JobQueue
    settings: TrainerSettings
    job: str
    attempt: int
    worker: int
    terminated: Callable[[], bool]
    join: Callable[[TrainSpec, Attempt], "Ranks"] = _alone
    is_coordinated: bool = False

    def report(self, state: JobState, reason: str = "", diverged: bool = False) -> bool:
        """Reports a state of the job; returns False if the attempt is over."""
        event = TimedEvent(StateChanged(state, reason))
        return self.queue.store.report(self.job, self.attempt, [event], diverged=diverged)


def run_attempt(job_id: str, attempt: int, worker: int) -> None:
    """Works on a job until it has finished or the attempt is ended; `worker` is the pid of the worker."""
    terminated = Termination()
    logs.configure("trainer", more_ids=traces.ids, job=job_id)
    try:
        settings = read_settings(os.environ)
        queue = JobQueue(connect(settings.redis), settings.open_registry().store.id())
        assignment = Assignment(queue, settings, job_id, attempt, worker, terminated)
        spec = queue.store.get(job_id).spec
        if isinstance(spec, TrainSpec) and spec.config.world_size > 1:
            _coordinate(assignment, spec.config.world_size)
            return
    except GptloopError as error:
        logger.error("job %s does not start: %s", job_id, error)
        sys.exit(1)
    traces.start("trainer")
    work_on(assignment)


def _coordinate(assignment: Assignment, world_size: int) -> None:
    """Runs the ranks of an attempt, of which the first does the work; ends the attempt if that rank has not."""
    queue, job, attempt = assignment.queue, assignment.job, assignment.attempt
    launcher = assignment.settings.launcher
    gpus = () if launcher else visible_gpus(os.environ)
    programs = commands(job, attempt, world_size, launcher, os.environ, gpus)
    reason = run_ranks(programs, assignment.terminated, lambda: os.getppid() != assignment.worker)
    if not queue.store.is_current(job, attempt):
        return
    if assignment.terminated():
        queue.give_back(job, attempt)
    else:
        reason = reason or "The ranks ended without an end of the job"
        logger.warning("job %s: %s", job, reason)
        queue.lose(job, attempt, reason)


def work_on(assignment: Assignment) -> None:
    """Does the work of an attempt, and ends the attempt, unless a coordinator has to end it because a rank was lost.

    An error of the job itself, such as bad data or a diverging loss, fails the job at once.
    """
    queue, settings, job_id, attempt = assignment.queue, assignment.settings, assignment.job, assignment.attempt
    report = assignment.report
    try:
        is_current = report(JobState.RUNNING)
    except GptloopError as error:
        logger.error("job %s does not start: %s", job_id, error)
        sys.exit(1)
    if not is_current:
        logger.warning("job %s has ended, or is at a later attempt than %d", job_id, attempt)
        return
    reporter = Reporter(queue, job_id, attempt, assignment.worker, settings.stuck_s)

    def stop_requested() -> bool:
        return reporter.stop_requested() or assignment.terminated()

    # Stays None if another process ends the attempt.
    end: partial[bool] | None = None
    try:
        # An evaluation decodes beside busy processes, whose cores its threads must not take while they wait.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        device = accelerator.prepare(settings.directories.cache / "trainer")
        given = Attempt(
            *(attempt, settings.directories, settings.retention, device, reporter.emit, stop_requested),
            best_by=settings.best_by,
            groq=settings.groq,
            job=job_id,
            settle=partial(settle, queue, settings.open_registry(), job_id, attempt),
        )
        completed = _work(queue.store.get(job_id), given, assignment.join)
    except Paused as paused:
        end = partial(queue.pause, job_id, attempt, paused.until, str(paused))
    except Suspended as suspended:
        end = partial(queue.suspend, job_id, attempt, suspended.evaluation)
    except RunOwnershipLost as error:
        # The process that owns the run now reports how it continues.
        logger.warning("job %s: %s", job_id, error)
    except (Unavailable, StoreFailed, UnreadableCheckpoint) as error:
        # The next attempt may find the missing service again.
        logger.warning("job %s: %s", job_id, error)
        # A coordinator knows which rank was lost, and why.
        if not (isinstance(error, RankLost) and assignment.is_coordinated):
            end = partial(queue.lose, job_id, attempt, shown(error, _REASON_LENGTH).rstrip("."))
    except GptloopError as error:
        logger.error("job %s failed: %s", job_id, error)
        diverged = isinstance(error, TrainingDiverged)
        end = partial(report, JobState.FAILED, shown(error, _REASON_LENGTH), diverged)
    except Exception as error:
        logger.exception("job %s failed", job_id)
        reason = f"{type(error).__name__}: {shown(error, _REASON_LENGTH)} (the worker's log has more)"
        end = partial(report, JobState.FAILED, reason)
    else:
        if completed:
            end = partial(report, JobState.FINISHED)
        elif reporter.cancelled:
            end = partial(report, JobState.CANCELLED)
        else:
            end = partial(queue.give_back, job_id, attempt)
    finally:
        reporter.close(end)
        try:
            release_ended(queue, settings.open_registry())
        except GptloopError as error:
            logger.warning("the holds of ended jobs stay until another job ends: %s", error)


def _work(record: JobRecord, attempt: Attempt, join: Callable[[TrainSpec, Attempt], "Ranks"]) -> bool:
    """Does the work of a job; returns whether it is complete."""
    spec = record.spec
    if spec is None:
        raise FailedPrecondition(record.reason)
    run = {"run": spec.run} if isinstance(spec, RunSpec) else {}
    facts = {f"gptloop.{name}": value for name, value in {"job": record.id, **run}.items()}
    with about(**run), traces.span(f"job {spec.kind.value}", {**facts, "gptloop.attempt": attempt.number}):
        require_same(spec.files, spec.file_sizes)
        try:
            if isinstance(spec, StoriesSpec):
                from trainer_service.distillation.stories import write_stories

                write_stories(spec, attempt)
                return True
            return _compute(spec, attempt, join)
        except Stopped:
            return False


def _compute(
    spec: PrepareSpec | TrainSpec | EvaluateSpec, attempt: Attempt, join: Callable[[TrainSpec, Attempt], "Ranks"]
) -> bool:
    """Does the work of a job that may need MLX; returns whether it is complete."""
    # These bring MLX in, so not before the accelerator is prepared.
    from trainer_service.evaluation.job import evaluate_version
    from trainer_service.run import TrainingRun, prepare_data
    from trainer_service.training.cpu.library import begin_loading

    if attempt.device.backend == "cpu" and not isinstance(spec, PrepareSpec):
        # It compiles while the text is prepared.
        begin_loading()
    match spec:
        case EvaluateSpec():
            evaluate_version(spec, attempt)
        case PrepareSpec():
            prepare_data(spec, attempt)
        case TrainSpec():
            return TrainingRun(spec, attempt, join(spec, attempt)).train()
    return True


if __name__ == "__main__":
    run_attempt(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
