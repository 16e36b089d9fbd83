"""What RQ calls, in a process of its own for each job."""

import logging
import os
import signal

from rq import Retry

from shared import accelerator, logs
from shared.errors import GptloopError, RunOwnershipLost
from trainer_service.events import JobState, Notice, StateChanged
from trainer_service.queue import JobQueue
from trainer_service.redis_server import connect
from trainer_service.reporter import Reporter
from trainer_service.settings import read_settings
from trainer_service.spec import JobSpec

logger = logging.getLogger(__name__)

# A run that is interrupted goes back to the queue as often as that happens.
_INTERRUPTIONS = 1_000_000


def run_training(job_id: str, spec_json: str) -> Retry | None:
    """Trains the run of a job to its end; returns `Retry` where it was interrupted and is to go on later.

    An error of the job itself (bad data, a diverging loss) fails the job and is not tried again.
    """
    logs.configure("trainer")
    settings = read_settings(os.environ)
    reporter = Reporter(JobQueue(connect(settings.redis_url)), job_id)
    terminated = False

    def terminate(_signal: int, _frame: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    reporter.tell(StateChanged(JobState.RUNNING))
    try:
        device = accelerator.prepare(settings.directories.cache / "trainer", own_threads=True)
        if device.backend == "cpu" and device.blas is None:
            reporter.tell(Notice(accelerator.NO_BLAS))
        # Only now, as MLX must load after its fast BLAS.
        from trainer_service.run import StoppedInPreparation, TrainingRun

        def stop_requested() -> bool:
            return terminated or reporter.cancelled or reporter.orphaned

        try:
            run = TrainingRun(JobSpec.from_json(spec_json), settings.directories, reporter.tell, stop_requested)
            completed = run.train(device)
        except StoppedInPreparation:
            completed = False
    except RunOwnershipLost as error:
        # Whoever owns the run now tells how it goes on.
        logger.warning("job %s: %s", job_id, error)
    except GptloopError as error:
        logger.error("job %s failed: %s", job_id, error)
        reporter.tell(StateChanged(JobState.FAILED, str(error)))
    except Exception as error:
        logger.exception("job %s failed", job_id)
        reporter.tell(StateChanged(JobState.FAILED, f"{type(error).__name__}: {error} (the worker's log has more)"))
    else:
        if completed:
            reporter.tell(StateChanged(JobState.FINISHED))
        elif reporter.cancelled:
            reporter.tell(StateChanged(JobState.CANCELLED))
        else:
            reporter.tell(StateChanged(JobState.QUEUED, "The worker was stopped; the run goes on when one is back."))
            return Retry(max=_INTERRUPTIONS)
    finally:
        reporter.close()
    return None
