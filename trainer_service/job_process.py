"""Runs an attempt at a job in its own process: `python -m trainer_service.job_process JOB ATTEMPT WORKER`."""

import logging
import os
import signal
import sys
from functools import partial

from shared.device import accelerator
from shared.errors import (
    FailedPrecondition,
    GptloopError,
    RunOwnershipLost,
    TrainingDiverged,
    Unavailable,
    shown,
)
from shared.registry.store import StoreFailed
from shared.service import logs, traces
from shared.service.log_ids import about
from trainer_service.jobs.attempt import Attempt, Paused, Stopped
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.local_files import require_same
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.reporter import Reporter
from trainer_service.jobs.specs import EvaluateSpec, PrepareSpec, RunSpec, StoriesSpec, TrainSpec
from trainer_service.jobs.submit import release_ended, settle
from trainer_service.redis_client import connect
from trainer_service.settings import read_settings

logger = logging.getLogger(__name__)

# Limits the message of a library.
_REASON_LENGTH = 400


def run_attempt(job_id: str, attempt: int, worker: int) -> None:
    """Works on a job until it has finished or the attempt is ended; `worker` is the pid of the worker.

    An error of the job itself, such as bad data or a diverging loss, fails the job at once.
    """
    terminated = False

    def terminate(_signal: int, _frame: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    logs.configure("trainer", more_ids=traces.ids, job=job_id)
    settings = read_settings(os.environ)
    traces.start("trainer")
    queue = JobQueue(connect(settings.redis), settings.open_registry().store.id())

    def report(state: JobState, reason: str = "", diverged: bool = False) -> bool:
        return queue.store.report(job_id, attempt, [TimedEvent(StateChanged(state, reason))], diverged=diverged)

    try:
        is_current = report(JobState.RUNNING)
    except GptloopError as error:
        logger.error("job %s does not start: %s", job_id, error)
        sys.exit(1)
    if not is_current:
        logger.warning("job %s has ended, or is at a later attempt than %d", job_id, attempt)
        return
    reporter = Reporter(queue, job_id, attempt, worker, settings.stuck_s)

    def stop_requested() -> bool:
        return reporter.stop_requested() or terminated

    end: partial[bool] | None = None
    try:
        # An evaluation decodes beside busy processes, whose cores its threads must not take while they wait.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        device = accelerator.prepare(settings.directories.cache / "trainer", own_threads=True)
        given = Attempt(
            *(attempt, settings.directories, settings.retention, device, reporter.emit, stop_requested),
            best_by=settings.best_by,
            groq=settings.groq,
            job=job_id,
            settle=partial(settle, queue, settings.open_registry(), job_id, attempt),
        )
        completed = _work(queue.store.get(job_id), given)
    except Paused as paused:
        end = partial(queue.pause, job_id, attempt, paused.until, str(paused))
    except RunOwnershipLost as error:
        # The process that owns the run now reports how it continues.
        logger.warning("job %s: %s", job_id, error)
    except (Unavailable, StoreFailed) as error:
        # The next attempt may find the missing service again.
        logger.warning("job %s: %s", job_id, error)
        reason = shown(error, _REASON_LENGTH).rstrip(".")
        end = partial(queue.lose, job_id, attempt, reason)
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


def _work(record: JobRecord, attempt: Attempt) -> bool:
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
            return _compute(spec, attempt)
        except Stopped:
            return False


def _compute(spec: PrepareSpec | TrainSpec | EvaluateSpec, attempt: Attempt) -> bool:
    """Does the work of a job that may need MLX; returns whether it is complete."""
    if attempt.device.backend == "cpu" and attempt.device.blas is None:
        attempt.emit(Notice(accelerator.NO_BLAS))
    # Imported here, because MLX must load after its fast BLAS.
    from trainer_service.evaluation.job import evaluate_version
    from trainer_service.run import TrainingRun, prepare_data

    match spec:
        case EvaluateSpec():
            evaluate_version(spec, attempt)
        case PrepareSpec():
            prepare_data(spec, attempt)
        case TrainSpec():
            return TrainingRun(spec, attempt).train()
    return True


if __name__ == "__main__":
    run_attempt(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
