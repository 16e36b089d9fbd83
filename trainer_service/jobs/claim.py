"""Waits for an attempt at one job and takes it, for a process that works on this job alone."""

import logging
import time
from collections.abc import Callable

from shared.errors import Unavailable
from shared.service.log_ids import with_ids
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.watch import Watch

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0


def claim_when_due(queue: JobQueue, job_id: str, stop_requested: Callable[[], bool]) -> int | None:
    """Takes the next attempt at a job as soon as it waits for a worker, and returns its number.

    Returns None if a stop is requested first. Waits for Redis too, and watches all jobs meanwhile as a worker does:
    without a worker nobody else notices that the attempt before this one is lost. Raises `NotFound`, or
    `FailedPrecondition` if the job has ended.
    """
    watch, waits = Watch(queue), False
    while not stop_requested():
        try:
            watch.look()
            attempt = queue.claim(job_id)
            if attempt is not None:
                return attempt
        except Unavailable as error:
            if not waits:
                logger.warning("job %s: it waits: %s", job_id, error, extra=with_ids(job=job_id))
            waits = True
        time.sleep(_INTERVAL_S)
    return None
