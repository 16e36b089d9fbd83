"""The RQ worker: takes one job at a time and runs each in a process of its own, as MLX does not survive a fork."""

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import SpawnWorker

from shared.errors import Unavailable
from trainer_service.events import JobState, StateChanged, TimedEvent
from trainer_service.queue import LEASE_S, JobQueue

logger = logging.getLogger(__name__)

# How often RQ looks for jobs whose worker died, and how often a worker with a job says that it lives.
_MAINTENANCE_INTERVAL_S = 15
_HEARTBEAT_INTERVAL_S = 10
_REDIS_LIMIT_S = 30.0
_POLL_S = 0.1


class TrainingWorker(SpawnWorker):
    """RQ's worker with two differences: a shutdown is passed on to the training process, which writes its state and
    goes back to the queue, and a training process that dies is told to whoever follows the job."""

    def handle_warm_shutdown_request(self) -> None:
        """Asks the training process to end after its step."""
        super().handle_warm_shutdown_request()
        if self.horse_pid:
            # That process alone: RQ would signal its group, and with it a compiler at work for MLX.
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """Tells Redis that the job goes on; where Redis is gone, training goes on all the same."""
        try:
            super().maintain_heartbeats(job, execution)
        except RedisError as error:
            logger.warning("job %s: no heartbeat, for Redis does not answer: %s", job.id, error)

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: Any) -> None:
        """Says why the training process is gone, and whether it is started anew."""
        ended = os.waitstatus_to_exitcode(ret_val)
        reason = f"was killed by signal {-ended}" if ended < 0 else f"ended with exit code {ended}"
        if ended == -signal.SIGKILL:
            reason += " (is the machine out of memory? a smaller batch_size needs less)"
        if job.retries_left:
            event = StateChanged(JobState.QUEUED, f"The training process {reason}; it goes on from its last state.")
        else:
            event = StateChanged(JobState.FAILED, f"The training process {reason}, too often to be started again.")
        queue = JobQueue(self.connection)
        try:
            queue.end_job_lease(job.id)
            queue.tell(job.id, [TimedEvent(event)])
        except Unavailable as error:
            logger.warning("job %s: %s %s", job.id, event.reason, error)


def work(connection: Redis) -> None:
    """Takes jobs until SIGTERM or SIGINT; a second one kills the job that runs.

    Waits some seconds for a Redis that starts beside it; raises `Unavailable` where none answers.
    """
    queue = JobQueue(connection)
    _wait_for_redis(queue)
    worker = TrainingWorker(
        [queue.rq],
        connection=connection,
        serializer=JSONSerializer,
        worker_ttl=60,
        maintenance_interval=_MAINTENANCE_INTERVAL_S,
        job_monitoring_interval=_HEARTBEAT_INTERVAL_S,
    )
    ended = threading.Event()
    lease = threading.Thread(target=_keep_lease, args=(queue, worker.name, ended), name="lease", daemon=True)
    lease.start()
    try:
        worker.work(logging_level="WARNING")
    finally:
        ended.set()
        lease.join()


def _wait_for_redis(queue: JobQueue) -> None:
    deadline_s = time.monotonic() + _REDIS_LIMIT_S
    while True:
        try:
            queue.live_workers()
            return
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def _keep_lease(queue: JobQueue, name: str, ended: threading.Event) -> None:
    while True:
        # Redis may be restarting; the lease is renewed when it is back.
        with suppress(Unavailable):
            queue.renew_worker_lease(name)
        if ended.wait(LEASE_S / 5):
            with suppress(Unavailable):
                queue.end_worker_lease(name)
            return
