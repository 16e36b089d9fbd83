"""The worker: takes one job at a time, and runs it in a process of its own, because MLX does not survive a fork."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from redis import Redis

from shared.errors import FailedPrecondition, NotFound, Unavailable
from shared.registry.store import Store
from shared.service.log_ids import with_ids
from trainer_service.jobs.job_store import START_LEASE_S
from trainer_service.jobs.local_files import place_of
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.rq_adapter import AttemptWorker
from trainer_service.jobs.watch import AttemptName, Watch
from trainer_service.redis_client import check_server, connect, reachable
from trainer_service.settings import TrainerSettings

logger = logging.getLogger(__name__)

_REDIS_LIMIT_S = 30.0
_POLL_S = 0.1
_WATCH_INTERVAL_S = 1.0
# A process that has lost its job ends by itself after its step; it is killed after this time.
_LOST_LIMIT_S = 10.0


class AttemptRunner:
    """Runs attempts in processes of this project, `trainer_service.job_process`, and returns interrupted jobs.

    The worker's thread calls the methods, except `end_lost`, which the thread of the watch calls. No attempt begins
    while `may_take` is not set.
    """

    def __init__(self, queue: JobQueue, offer: Offer, may_take: threading.Event) -> None:
        self._queue = queue
        self._offer = offer
        self._may_take = may_take
        # The attempt that runs, the pid of its process, and since when another attempt has had the job.
        self._attempt: AttemptName | None = None
        self._pid = 0
        self._lost_since_s: float | None = None
        self._stop_requested = False

    def take(self) -> AttemptName | None:
        """Takes the first waiting attempt whose needs this worker meets, if it may take one."""
        return self._queue.take(self._offer) if self._may_take.is_set() else None

    def start(self, job_id: str, attempt: int) -> int:
        """Gives the attempt a longer lease, starts its process in a process group of its own, and returns the pid."""
        with suppress(Unavailable, NotFound):
            self._queue.store.renew_attempt(job_id, attempt, START_LEASE_S)
        self._attempt = (job_id, attempt)
        # The environment passes the address of Redis on.
        command = [sys.executable, "-m", "trainer_service.job_process", job_id, str(attempt), str(os.getpid())]
        self._pid = os.posix_spawn(sys.executable, command, os.environ, setpgroup=0)
        if self._stop_requested:
            self.request_stop()
        return self._pid

    def request_stop(self) -> None:
        """Asks the process to end after its step."""
        self._stop_requested = True
        if self._pid:
            # Only the process: RQ would signal its group, which may contain a compiler at work for MLX.
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGTERM)

    def on_exit(self) -> None:
        """Forgets the attempt, whose process has ended."""
        self._attempt, self._pid = None, 0

    def on_crash(self, job_id: str, attempt: int, exit_code: int) -> None:
        """Ends the attempt of a process that did not end it by itself."""
        if exit_code < 0:
            reason = f"was killed by signal {-exit_code}"
        else:
            reason = f"ended with exit code {exit_code} (the worker's log has more)"
        if exit_code == -signal.SIGKILL:
            reason += " (is the machine out of memory? a smaller batch_size needs less)"
        try:
            if exit_code == -signal.SIGTERM and self._stop_requested:  # before the process handled the signal
                self._queue.give_back(job_id, attempt)
            else:
                self._queue.lose(job_id, attempt, f"The training process {reason}")
        except (Unavailable, NotFound) as error:
            logger.warning("job %s: %s %s", job_id, reason, error, extra=with_ids(job=job_id))

    def end_lost(self, given_up: Collection[AttemptName]) -> None:
        """Kills the process if its attempt was given up, or if it outlives the loss of its job for too long."""
        attempt, pid, now_s = self._attempt, self._pid, time.monotonic()
        if attempt is None or attempt in given_up or self._queue.store.is_current(*attempt):
            self._lost_since_s = None
        elif self._lost_since_s is None:
            self._lost_since_s = now_s
        is_overdue = self._lost_since_s is not None and now_s - self._lost_since_s > _LOST_LIMIT_S
        if attempt and pid and (is_overdue or attempt in given_up) and self._attempt == attempt:
            logger.error(
                "job %s: its process is stuck or has lost its job, and is killed",
                attempt[0],
                extra=with_ids(job=attempt[0]),
            )
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def work(settings: TrainerSettings) -> None:
    """Takes jobs of the registry until SIGTERM or SIGINT; a second signal kills the running job.

    Waits some seconds for a Redis that starts at the same time. Raises `Unavailable` if Redis does not answer then or
    fails later, and `FailedPrecondition` if it cannot store jobs.
    """
    store = settings.open_registry().store
    registry = store.id()
    # RQ blocks its connection, so the watch has its own.
    with connect(settings.redis) as own, connect(settings.redis) as connection:
        _wait_for_redis(connection)
        queue = JobQueue(connection, registry)
        place = place_of(settings.directories.data)
        offer = Offer.of_this_machine(settings.worker_ranks, bool(settings.launcher), place)
        has_registry = threading.Event()
        has_registry.set()
        runner = AttemptRunner(queue, offer, has_registry)
        worker = AttemptWorker(queue.attempts, connection, runner)
        ended = threading.Event()
        watch = threading.Thread(
            target=_watch, args=(JobQueue(own, registry), runner, worker.name, offer, ended), name="watch", daemon=True
        )
        # Apart from the watch, which may not wait for a store that fails.
        check = threading.Thread(
            target=_check_registry, args=(store, registry, has_registry, ended), name="registry", daemon=True
        )
        # Until RQ's own handler replaces this one: the watch, too, ends the worker by this signal.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        logger.info("the worker offers %s", offer)
        try:
            watch.start()
            check.start()
            with reachable(connection):
                worker.work(logging_level="WARNING")
        finally:
            ended.set()
            watch.join()


def _wait_for_redis(connection: Redis) -> None:
    deadline_s = time.monotonic() + _REDIS_LIMIT_S
    while True:
        try:
            return check_server(connection)
        except Unavailable:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)


def _watch(queue: JobQueue, runner: AttemptRunner, name: str, offer: Offer, ended: threading.Event) -> None:
    """Renews this worker's lease, and watches all jobs."""
    watch = Watch(queue)
    while not ended.is_set():
        try:
            queue.store.workers.renew(name, offer)
            runner.end_lost(watch.look())
        except Unavailable as error:
            logger.debug("the watch waits: %s", error)
        except Exception:
            logger.exception("The watch over the jobs failed; it continues.")
        ended.wait(_WATCH_INTERVAL_S)
    with suppress(Unavailable):
        queue.store.workers.end(name)


def _check_registry(store: Store, registry: str, has_registry: threading.Event, ended: threading.Event) -> None:
    """Clears `has_registry` while the registry cannot be reached; ends the worker if another one is in its place."""
    problem = ""
    while not ended.wait(_WATCH_INTERVAL_S):
        try:
            if store.id() != registry:
                logger.error(
                    "%s contains another registry now: the worker ends, and its next start uses that one",
                    store.address,
                )
                os.kill(os.getpid(), signal.SIGTERM)
                return
            if problem:
                logger.info("the worker takes jobs again")
            problem = ""
            has_registry.set()
        except (FailedPrecondition, OSError) as error:
            if str(error) != problem:
                logger.warning("the worker takes no job: %s", error)
            problem = str(error)
            has_registry.clear()
