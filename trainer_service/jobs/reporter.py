"""Sends the events of an attempt to Redis on a thread of its own, so that training never waits for Redis."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from shared.errors import NotFound, Unavailable
from trainer_service.jobs.events import Event, Progress, RunStarted, TimedEvent
from trainer_service.jobs.queue import JobQueue

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
# A thread that runs this much later than planned was frozen with its process, or waited for Redis.
_FROZEN_S = 5.0
_LAST_TRY_S = 20.0
_ORPHAN_LIMIT_S = 8.0
# Enough for an outage of Redis of many hours; the oldest events are dropped first.
_MAX_EVENTS = 50_000
_SENT_AT_ONCE = 1000


class Reporter:
    """Sends events to the queue, renews the attempt's lease while there is progress, and asks whether to stop.

    `cancelled` says whether the job was cancelled, and `superseded` whether it has ended or another attempt has it.

    The thread owns the connection. Every other method can be called from any thread, and all return at once except
    `close`. While Redis does not answer, events wait. The lease ends after `stuck_s` without progress. `worker` is the
    pid of the process that started this one.
    """

    def __init__(self, queue: JobQueue, job_id: str, attempt: int, worker: int, stuck_s: float) -> None:
        self._queue = queue
        self._job_id = job_id
        self._attempt = attempt
        self._stuck_s = stuck_s
        self._events: deque[TimedEvent] = deque(maxlen=_MAX_EVENTS)
        self._lock = threading.Lock()
        self._new_tokens = 0
        self._counted_tokens = 0
        self._progressed_s = time.monotonic()
        self.cancelled = False
        self.superseded = False
        self._closing = threading.Event()
        self._end: Callable[[], object] | None = None
        self._worker = worker
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        """Queues an event to be sent."""
        with self._lock:
            self._events.append(TimedEvent(event))
            if isinstance(event, RunStarted):
                self._counted_tokens = event.first_tokens
            elif isinstance(event, Progress):
                self._new_tokens += event.tokens - self._counted_tokens
                self._counted_tokens = event.tokens

    def stop_requested(self) -> bool:
        """Whether the attempt has to end. A call also counts as progress."""
        self._progressed_s = time.monotonic()
        return self.cancelled or self.superseded or self.orphaned

    @property
    def orphaned(self) -> bool:
        """Whether the worker that started this process is gone; then the process ends within some seconds."""
        return os.getppid() != self._worker

    def close(self, end: Callable[[], object] | None) -> None:
        """Sends the remaining events, and calls `end` unless another attempt has the job.

        Gives up if Redis does not answer for some seconds.
        """
        self._end = end
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        turn_s = time.monotonic()
        while not self._closing.wait(_INTERVAL_S):
            now_s = time.monotonic()
            if now_s - turn_s > _FROZEN_S:
                # Nothing could progress in that time, so the process is not stuck.
                self._progressed_s = min(self._progressed_s + now_s - turn_s, now_s)
            turn_s = now_s
            self._try(self._exchange)
            # The loop may end its step and write its state, but a longer step is not waited for.
            if self.orphaned and not self._closing.wait(_ORPHAN_LIMIT_S):
                logger.error("job %s: the worker is gone, so this process ends in the middle of its step", self._job_id)
                self._try(lambda: self._queue.lose(self._job_id, self._attempt, "The worker was killed"))
                os._exit(1)
        for _ in range(round(_LAST_TRY_S / _INTERVAL_S)):
            if self._try(self._finish):
                return
            time.sleep(_INTERVAL_S)
        logger.error("job %s: Redis does not answer; %d events are lost", self._job_id, len(self._events))

    def _try(self, action: Callable[[], object]) -> bool:
        try:
            action()
        except Unavailable as error:
            if self._reachable:
                logger.warning("job %s: %s Training continues.", self._job_id, error)
            self._reachable = False
            return False
        except NotFound as error:
            logger.warning("job %s: %s", self._job_id, error)
            self.superseded = True
        self._reachable = True
        return True

    def _exchange(self) -> None:
        if self.superseded:
            return
        # After an outage there may be many events: the lease is renewed between them.
        while self._send_some() and self._events:
            pass
        if not self.superseded and self._queue.store.cancel_requested(self._job_id):
            self.cancelled = True

    def _send_some(self) -> bool:
        """Sends the oldest events and renews the lease; returns False if another attempt has the job."""
        with self._lock:
            events, new_tokens = list(islice(self._events, _SENT_AT_ONCE)), self._new_tokens
        if not self._queue.store.report(self._job_id, self._attempt, events, new_tokens):
            logger.warning("job %s: it has ended, or another attempt has taken over", self._job_id)
            self.superseded = True
            return False
        with self._lock:
            self._new_tokens -= new_tokens
            for _ in events:
                self._events.popleft()
        if time.monotonic() - self._progressed_s < self._stuck_s:
            self._queue.store.renew_attempt(self._job_id, self._attempt)
        return True

    def _finish(self) -> None:
        self._exchange()
        if self._end and not self.superseded:
            self._end()
