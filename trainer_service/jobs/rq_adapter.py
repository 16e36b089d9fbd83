"""Everything that uses RQ: the jobs that it carries, the queue that it keeps, and the worker that takes jobs from it.

Parts of RQ that are not public are used here, so `pyproject.toml` pins RQ to one minor version.
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar, cast

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError
from rq import Queue
from rq.exceptions import NoSuchJobError, StopRequested
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import Worker, WorkerStatus

from shared.errors import Unavailable
from shared.service.log_ids import with_ids
from trainer_service.jobs.keys import Keys
from trainer_service.jobs.records import number_of
from trainer_service.redis_client import reachable, redis_failure

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# The function that RQ stores with every attempt; the worker never calls a function by its name.
JOB_FUNCTION = "trainer_service.job_process.run_attempt"

# How often RQ cleans up, and how often a busy worker renews its entry in RQ.
_MAINTENANCE_INTERVAL_S = 60
_HEARTBEAT_INTERVAL_S = 10
_WORKER_TTL_S = 60
_ENDED_TTL_S = 60
# How long a worker waits for an attempt before it renews its entry in RQ and looks again.
_WAIT_S = 10.0
# How long the worker waits before it tries a command again.
_RETRY_S = 1.0
# What RQ raises on what it cannot read.
_UNREADABLE = (ValueError, TypeError, LookupError)


class AttemptJob(Job):
    """The RQ job that carries an attempt: the id of a job of ours, and the number of the attempt.

    RQ imports and calls functions that it reads from Redis, and callbacks too, so every other content is rejected.
    """

    def restore(self, raw_data: Any) -> Any:
        """Reads the job as RQ does; raises `NoSuchJobError`, on which RQ drops the job."""
        try:
            super().restore(raw_data)
            calls = (b"success_callback_name", b"failure_callback_name", b"stopped_callback_name", b"webhooks")
            is_valid = (
                self.func_name == JOB_FUNCTION
                and self.instance is None
                and not self.kwargs
                and not any(raw_data.get(name) for name in calls)
                and [type(argument) for argument in self.args] == [str, int]
            )
        except Exception as error:
            raise NoSuchJobError(f"{self.id} cannot be understood: {error!r}") from error
        if not is_valid:
            logger.error("%r in the queue is not a job of this project, and is dropped", self.id)
            raise NoSuchJobError(f"{self.id} is not a job of this project.")

    def get_status(self, refresh: bool = True) -> JobStatus:
        """Returns what RQ knows of the attempt; a state that RQ does not know counts as started."""
        try:
            return super().get_status(refresh)
        except ValueError:
            return JobStatus.STARTED


class AttemptQueue:
    """The attempts that wait for a worker, in RQ's queue, ordered by the tickets of their jobs.

    Each attempt is an RQ job of its own, which RQ never retries. An attempt of a job that was interrupted, or that
    waited for other jobs, is inserted before those of jobs with higher tickets.
    """

    def __init__(self, connection: Redis, keys: Keys) -> None:
        self._redis = connection
        self._keys = keys
        self.rq = Queue(
            keys.queue_name, connection=connection, serializer=JSONSerializer, job_class=AttemptJob, default_timeout=-1
        )
        # The key of the list in Redis.
        self.key = str(self.rq.key)

    def waiting(self) -> list[tuple[str, int]]:
        """Returns the waiting jobs and the numbers of their attempts, in the order in which workers take them."""
        with reachable(self._redis):
            ids = cast(list[bytes], self._redis.lrange(self.key, 0, -1))
        return [each for each in map(self._read_id, ids) if each is not None]

    def _read_id(self, rq_id: bytes) -> tuple[str, int] | None:
        """Returns the job and the attempt that a name of RQ stands for; None for another name."""
        registry, _, rest = rq_id.decode(errors="replace").partition("-")
        job_id, _, attempt = rest.rpartition("-")
        number = number_of(attempt)
        if registry != self._keys.registry or number is None:
            return None  # other programs may have written to Redis
        return (job_id, number) if self._rq_id(job_id, number).encode() == rq_id else None

    def insert(self, pipeline: Pipeline, job_id: str, attempt: int, ticket: int) -> None:
        """Inserts an attempt at the position of its job's ticket, as part of a transaction that watches `key`."""
        job = self.rq.create_job(
            JOB_FUNCTION,
            args=(job_id, attempt),
            job_id=self._rq_id(job_id, attempt),
            result_ttl=_ENDED_TTL_S,
            failure_ttl=_ENDED_TTL_S,
        )
        # RQ's own `enqueue` would begin another transaction.
        job.save(pipeline=pipeline)
        pipeline.sadd(self.rq.redis_queues_keys, self.key)
        pipeline.hset(self._keys.job(job_id), "sent", attempt)
        pipeline.xadd(self._keys.sent, {"job": job_id}, maxlen=1)
        following = self._first_after(ticket)
        if following is None:
            self.rq.push_job_id(job.id, pipeline=pipeline)
        else:
            pipeline.linsert(self.key, "before", following, job.id)

    def take(self, pipeline: Pipeline, job_id: str, attempt: int) -> None:
        """Takes an attempt out of the queue, as part of a transaction that watches `key`."""
        pipeline.lrem(self.key, 0, self._rq_id(job_id, attempt))

    def fetch(self, job_id: str, attempt: int) -> Job | None:
        """Returns the RQ job of an attempt that was taken; None if something foreign has replaced it."""
        with reachable(self._redis):
            return self.rq.fetch_job(self._rq_id(job_id, attempt))

    def forget(self, job_id: str, attempt: int) -> None:
        """Removes the RQ job of an attempt that no worker of RQ will run."""
        with reachable(self._redis):
            self._redis.delete(AttemptJob.key_for(self._rq_id(job_id, attempt)))

    def remove(self, job_id: str, attempt: int) -> None:
        """Removes an attempt, if it waits."""
        with reachable(self._redis):
            removed = self.rq.remove(self._rq_id(job_id, attempt))
        if removed:
            self.forget(job_id, attempt)

    def wait(self, seen: str, limit_s: float) -> str:
        """Waits until another attempt was handed over than the one that `seen` stands for, or for a limited time.

        Returns what stands for the last one now; "0" is before the first one. Every waiting worker is woken.
        """
        with reachable(self._redis):
            answer: Any = self._redis.xread({self._keys.sent: seen}, block=round(limit_s * 1000))
        if not answer:
            return seen
        entries = next(iter(answer.values()))[0] if isinstance(answer, dict) else answer[0][1]
        return str(entries[-1][0].decode())

    def drop_foreign(self) -> None:
        """Removes what is no attempt of this registry from RQ's queue, and everything from its list of what is about to
        start, which the leases of attempts replace."""
        with reachable(self._redis):
            for rq_id in cast(list[bytes], self._redis.lrange(self.key, 0, -1)):
                if self._read_id(rq_id) is None:
                    logger.error("%r in the queue is not a job of this project, and is dropped", rq_id)
                    self._redis.lrem(self.key, 0, cast(Any, rq_id))
            self._redis.delete(self.rq.intermediate_queue_key)

    def _first_after(self, ticket: int) -> str | None:
        """Returns RQ's id of the first waiting attempt whose job has a higher ticket."""
        waiting = self.waiting()
        if not waiting:
            return None
        tickets: Any = self._redis.zmscore(self._keys.jobs, [job_id for job_id, _ in waiting])
        for (job_id, attempt), other in zip(waiting, tickets, strict=True):
            if other is not None and float(other) > ticket:
                return self._rq_id(job_id, attempt)
        return None

    def _rq_id(self, job_id: str, attempt: int) -> str:
        return f"{self._keys.registry}-{job_id}-{attempt}"


class Runner(Protocol):
    """Takes attempts from the queue and runs them, one at a time, each in a process of its own."""

    def take(self) -> tuple[str, int] | None:
        """Takes the next attempt that can run here, and returns its job and its number; None if none waits."""

    def start(self, job_id: str, attempt: int) -> int:
        """Starts the process of the attempt and returns its pid."""

    def request_stop(self) -> None:
        """Asks the process to end after its step; a process that is about to start is asked when it has started."""

    def on_exit(self) -> None:
        """Is called when the process has ended."""

    def on_crash(self, job_id: str, attempt: int, exit_code: int) -> None:
        """Is called after `on_exit` if the exit code is not 0; it is `-n` if signal n killed the process."""


class AttemptWorker(Worker):
    """RQ's worker: takes attempts from the queue in their order, and waits for their processes.

    RQ neither imports nor calls anything for an attempt: the runner starts a process of this project. The worker waits
    for a Redis that refuses its commands, as it does for one that does not answer.
    """

    def __init__(self, queue: AttemptQueue, connection: Redis, runner: Runner) -> None:
        super().__init__(
            [queue.rq],
            connection=connection,
            serializer=JSONSerializer,
            job_class=AttemptJob,
            worker_ttl=_WORKER_TTL_S,
            maintenance_interval=_MAINTENANCE_INTERVAL_S,
            job_monitoring_interval=_HEARTBEAT_INTERVAL_S,
        )
        self._attempts = queue
        self._runner = runner
        # What stands for the last attempt that was handed over before the worker looked at the queue.
        self._seen = "0"

    def _set_ip_address(self, connection: Redis) -> None:
        # RQ asks Redis, whose answer contains the path of its socket, and redis-py splits the answer at spaces.
        self.ip_address = "unknown"

    def _set_connection(self, connection: Redis) -> Redis:
        # A connection that is open already would keep its limit, which is shorter than the wait for an attempt.
        connection.connection_pool.disconnect()
        connection.connection_pool.reset()
        return super()._set_connection(connection)

    def subscribe(self) -> None:
        """Listens to no commands of RQ: jobs are cancelled through their records."""

    def check_for_suspension(self, burst: bool) -> None:
        """Does not ask Redis: nothing suspends a worker."""

    def run_maintenance_tasks(self) -> None:
        """Cleans RQ's registries, if they contain nothing that RQ cannot read."""
        try:
            self._patiently(super().run_maintenance_tasks)
        except _UNREADABLE as error:
            logger.error("RQ's registries contain something foreign, and are not cleaned: %r", error)
            self.last_cleaned_at = now()  # type: ignore[assignment]  # RQ sets it alike

    def dequeue_job_and_maintain_ttl(self, timeout: int | None, max_idle_time: int | None = None) -> Any:
        """Takes the next attempt; without a `timeout` it returns None if none waits.

        RQ's own pop takes whatever comes first, also what this worker cannot do. While the worker is busy, a request
        to stop interrupts nothing, so that no attempt is taken and then forgotten.
        """
        while True:
            self._patiently(lambda: self.set_state(WorkerStatus.BUSY))
            self._patiently(self._attempts.drop_foreign)
            if taken := self._patiently(self._runner.take):
                if job := self._patiently(lambda: self._attempts.fetch(*taken)):
                    return job, self._attempts.rq
                continue
            self._patiently(lambda: self.set_state(WorkerStatus.IDLE))
            self.procline("waits for an attempt")
            if self._stop_requested:
                raise StopRequested
            if timeout is None:
                return None
            self.heartbeat()
            if self.should_run_maintenance_tasks:
                self.run_maintenance_tasks()
            self._seen = self._patiently(lambda: self._attempts.wait(self._seen, _WAIT_S))

    def heartbeat(self, timeout: int | None = None, pipeline: Pipeline | None = None) -> None:
        """Renews the worker's entry in RQ, at once if it is not part of a pipeline."""
        if pipeline is None:
            self._patiently(lambda: super(AttemptWorker, self).heartbeat(timeout))
        else:
            super().heartbeat(timeout, pipeline)

    def _patiently(self, action: Callable[[], Answer]) -> Answer:
        """Does something in Redis, again and again until Redis lets it or the worker is asked to stop."""
        waits = False
        while True:
            try:
                with reachable(self.connection):
                    return action()
            except Unavailable as error:
                if not waits:
                    logger.warning("the worker waits: %s", error)
                waits = True
            if self._stop_requested:
                raise StopRequested
            time.sleep(_RETRY_S)

    def handle_warm_shutdown_request(self) -> None:
        """Passes the shutdown on to the process of the attempt."""
        super().handle_warm_shutdown_request()
        self._runner.request_stop()

    def set_shutdown_requested_date(self) -> None:
        """Stores when the shutdown was requested, if Redis answers."""
        with suppress(RedisError):
            super().set_shutdown_requested_date()

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Runs an attempt to its end, unless Redis fails before it starts: the watch ends such an attempt."""
        try:
            self._run_attempt(job, queue)
        except RedisError as error:
            logger.warning("job %s: RQ cannot record its attempt: %s", job.id, redis_failure(error))

    def _run_attempt(self, job: Job, queue: Queue) -> None:
        execution = self.prepare_execution(job)
        self.prepare_job_execution(job)
        self._horse_pid = self._runner.start(*job.args)
        self.monitor_work_horse(job, queue, execution)
        with self.connection.pipeline() as pipeline:
            self.cleanup_execution(job, pipeline, execution)
            # Whatever Redis still stores of it.
            pipeline.delete(job.key, job.execution_registry.key)
            pipeline.execute()
        self.set_state(WorkerStatus.IDLE)

    def wait_for_horse(self) -> Any:
        """Waits for the process to end."""
        answer = super().wait_for_horse()
        self._runner.on_exit()
        return answer

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """Renews the job's entry in RQ; training continues while Redis does not answer."""
        try:
            super().maintain_heartbeats(job, execution)
        except RedisError as error:
            logger.warning(
                "job %s: no heartbeat, because Redis does not answer: %s",
                *(job.args[0], error),
                extra=with_ids(job=job.args[0]),
            )

    def handle_work_horse_killed(self, job: Job, retpid: int, ret_val: int, rusage: Any) -> None:
        """Reports the end of a process that did not exit normally."""
        job_id, attempt = job.args
        self._runner.on_crash(job_id, attempt, 0 if ret_val is None else os.waitstatus_to_exitcode(ret_val))

    def handle_job_failure(self, *_: Any, **__: Any) -> None:
        """Records nothing in RQ: the runner has ended the attempt."""
