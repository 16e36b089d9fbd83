"""The RQ worker: takes one job at a time, each into a process of its own, as MLX does not survive a fork."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq import Queue
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import Worker, WorkerStatus

from shared.errors import NotFound, Unavailable
from shared.registry.identity import registry_id
from trainer_service.jobs.queue import START_LEASE_S, STOPPED, JobQueue
from trainer_service.jobs.rq_adapter import AttemptJob
from trainer_service.jobs.watch import Watch
from trainer_service.redis_server import check_server, connect, redis_failure
from trainer_service.settings import TrainerSettings

logger = logging.getLogger(__name__)

# How often RQ clears up after itself, and how often a worker with a job says to RQ that it lives.
_MAINTENANCE_INTERVAL_S = 60
_HEARTBEAT_INTERVAL_S = 10
_REDIS_LIMIT_S = 30.0
_POLL_S = 0.1
_WATCH_INTERVAL_S = 1.0
# A training process that has lost its job ends by itself after its step.
_USELESS_LIMIT_S = 10.0


class TrainingWorker(Worker):
    """RQ's worker, which takes attempts from the queue in their order, and watches over their processes.

    The process is this project's own: it knows its job and where to look for it, and RQ neither imports nor calls
    anything there. A shutdown is passed on to it. Where it dies, the queue decides how the job goes on.
    """

    # What the worker takes jobs from.
    job_queue: JobQueue
    # The job and the number of the attempt that runs here, and since when it is of no use.
    attempt: tuple[str, int] | None = None
    # Whether the worker was asked to end because it serves a registry that is gone.
    is_to_end = False
    _useless_since_s: float | None = None

    def _set_ip_address(self, connection: Redis) -> None:
        # RQ would ask Redis, whose answer holds the path of its socket, and redis-py splits that at spaces.
        self.ip_address = "unknown"

    def handle_warm_shutdown_request(self) -> None:
        """Asks the training process to end after its step."""
        super().handle_warm_shutdown_request()
        if self.horse_pid:
            self._ask_to_end()

    def set_shutdown_requested_date(self) -> None:
        """Tells Redis when the shutdown was asked for, if it is there."""
        with suppress(RedisError):
            super().set_shutdown_requested_date()

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Runs an attempt; it has its lease from the first moment on."""
        job_id, number = job.args
        with suppress(Unavailable, NotFound):
            self.job_queue.renew_job_lease(job_id, number, START_LEASE_S)
        self.attempt = (job_id, number)
        execution = self.prepare_execution(job)
        self.prepare_job_execution(job, remove_from_intermediate_queue=True)
        self.fork_work_horse(job, queue)
        self.monitor_work_horse(job, queue, execution)
        self.attempt = None
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline, execution)
            # Without a look at what Redis still has of it.
            pipeline.delete(job.key, job.execution_registry.key)
            pipeline.execute()
        self.set_state(WorkerStatus.IDLE)

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """Starts the process of an attempt, in a group of its own; Redis's address stays in the environment."""
        command = [sys.executable, "-m", "trainer_service.job_process", *map(str, job.args), str(os.getpid())]
        self._horse_pid = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
        if self._stop_requested:  # since it was taken from the queue
            self._ask_to_end()

    def _ask_to_end(self) -> None:
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
        ended = 0 if ret_val is None else os.waitstatus_to_exitcode(ret_val)
        reason = f"was killed by signal {-ended}" if ended < 0 else f"ended with exit code {ended}"
        if ended == -signal.SIGKILL:
            reason += " (is the machine out of memory? a smaller batch_size needs less)"
        job_id, attempt = job.args
        try:
            if ended == -signal.SIGTERM and self._stop_requested:  # before it could do more about it
                self.job_queue.give_back(job_id, attempt, STOPPED)
            else:
                self.job_queue.lose(job_id, attempt, f"The training process {reason}")
        except (Unavailable, NotFound) as error:
            logger.warning("job %s: %s %s", job.id, reason, error)

    def end_useless(self, given_up: Collection[tuple[str, int]]) -> None:
        """Kills the training process where its attempt was given up, or does not end after another took its place."""
        attempt, process, now_s = self.attempt, self.horse_pid, time.monotonic()
        if attempt is None or attempt in given_up or self.job_queue.is_current(*attempt):
            self._useless_since_s = None
        elif self._useless_since_s is None:
            self._useless_since_s = now_s
        useless = self._useless_since_s is not None and now_s - self._useless_since_s > _USELESS_LIMIT_S
        if attempt and process and (useless or attempt in given_up) and self.attempt == attempt:
            logger.error("job %s: its process is stuck or has lost its job, and is killed", attempt[0])
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def work(settings: TrainerSettings) -> None:
    """Takes jobs of the registry until SIGTERM or SIGINT; a second one kills the job that runs.

    Waits some seconds for a Redis that starts beside it; raises `Unavailable` if none answers or if it fails later, and
    `FailedPrecondition` if it cannot hold jobs.
    """
    root = settings.directories.registry
    registry = registry_id(root)
    # RQ waits on its connection, and so the watch has one of its own.
    with connect(settings.redis_url) as own, connect(settings.redis_url) as connection:
        _wait_for_redis(connection)
        jobs = JobQueue(connection, registry)
        worker = TrainingWorker(
            [jobs.line.rq],
            connection=connection,
            serializer=JSONSerializer,
            job_class=AttemptJob,
            worker_ttl=60,
            maintenance_interval=_MAINTENANCE_INTERVAL_S,
            job_monitoring_interval=_HEARTBEAT_INTERVAL_S,
        )
        worker.job_queue = jobs
        ended = threading.Event()
        arguments = (JobQueue(own, registry), worker, root, ended)
        watch = threading.Thread(target=_watch, args=arguments, name="watch", daemon=True)
        watch.start()
        try:
            worker.work(logging_level="WARNING")
        except RedisError as error:
            raise redis_failure(error) from error
        finally:
            ended.set()
            watch.join()


def _wait_for_redis(connection: Redis) -> None:
    deadline_s = time.monotonic() + _REDIS_LIMIT_S
    while True:
        try:
            check_server(connection)
            return
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def _watch(queue: JobQueue, worker: TrainingWorker, root: Path, ended: threading.Event) -> None:
    """Keeps this worker's lease, watches over the jobs, and ends the worker if its registry was replaced by another."""
    watch = Watch(queue)
    while not ended.is_set():
        try:
            queue.renew_worker_lease(worker.name)
            worker.end_useless(watch.look())
            if registry_id(root) != queue.registry and not worker.is_to_end:
                logger.error(
                    "%s holds another registry by now: the worker ends, and is for the new one next time", root
                )
                worker.is_to_end = True
                os.kill(os.getpid(), signal.SIGTERM)
        except Unavailable as error:
            logger.debug("the watch waits: %s", error)
        except Exception:
            logger.exception("The watch over the jobs failed; it goes on.")
        ended.wait(_WATCH_INTERVAL_S)
    with suppress(Unavailable):
        queue.end_worker_lease(worker.name)
