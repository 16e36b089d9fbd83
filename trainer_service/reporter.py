"""What a training process tells Redis, from a thread of its own, so that training never waits for Redis."""

import logging
import os
import threading
from collections import deque
from contextlib import suppress

from shared.errors import Unavailable
from trainer_service.events import Event, Progress, RunStarted, TimedEvent
from trainer_service.queue import JobQueue

logger = logging.getLogger(__name__)

_INTERVAL_S = 0.5
_LAST_TRY_S = 20.0
_ORPHAN_LIMIT_S = 10.0
# Reports of a Redis outage of many hours; older ones are dropped first.
_KEPT_EVENTS = 50_000


class Reporter:
    """Carries events to the queue, renews the job's lease, and learns whether to stop.

    The thread owns the connection; `tell`, `cancelled` and `orphaned` may be called from any thread and return at once.
    Where Redis is gone, events wait and are told when it is back.
    """

    def __init__(self, queue: JobQueue, job_id: str) -> None:
        self._queue = queue
        self._job_id = job_id
        self._events: deque[TimedEvent] = deque(maxlen=_KEPT_EVENTS)
        self._lock = threading.Lock()
        self._new_tokens = 0
        self._counted_tokens = 0
        self._cancelled = threading.Event()
        self._closing = threading.Event()
        self._parent = os.getppid()
        self._reachable = True
        self._thread = threading.Thread(target=self._run, name="reporter", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        """Hands an event over."""
        with self._lock:
            self._events.append(TimedEvent(event))
            if isinstance(event, RunStarted):
                self._counted_tokens = event.first_tokens
            elif isinstance(event, Progress):
                self._new_tokens += event.tokens - self._counted_tokens
                self._counted_tokens = event.tokens

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked the job to end."""
        return self._cancelled.is_set()

    @property
    def orphaned(self) -> bool:
        """Whether the worker that started this process is gone; the process ends within some seconds then."""
        return os.getppid() != self._parent

    def close(self) -> None:
        """Tells what is left and gives the lease back; tries for some seconds where Redis is gone."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(_INTERVAL_S):
            self._try_exchange()
            if self.orphaned:
                # The loop may end its step and write its state, but nobody waits for a step that takes longer.
                if not self._closing.wait(_ORPHAN_LIMIT_S):
                    logger.error("job %s: the worker is gone, and so this process ends within its step", self._job_id)
                    os._exit(1)
                break
        for _ in range(round(_LAST_TRY_S / _INTERVAL_S)):
            if self._try_exchange():
                # Redis may be gone by now; the lease ends by itself then.
                with suppress(Unavailable):
                    self._queue.end_job_lease(self._job_id)
                return
            threading.Event().wait(_INTERVAL_S)
        logger.error("job %s: Redis does not answer, %d events are lost", self._job_id, len(self._events))

    def _try_exchange(self) -> bool:
        try:
            self._exchange()
        except Unavailable as error:
            if self._reachable:
                logger.warning("job %s: %s Training goes on.", self._job_id, error)
            self._reachable = False
            return False
        self._reachable = True
        return True

    def _exchange(self) -> None:
        self._queue.renew_job_lease(self._job_id)
        if self._queue.cancel_requested(self._job_id):
            self._cancelled.set()
        with self._lock:
            events, new_tokens = list(self._events), self._new_tokens
        if events:
            self._queue.tell(self._job_id, events, new_tokens)
            with self._lock:
                self._new_tokens -= new_tokens
                for _ in events:
                    self._events.popleft()
