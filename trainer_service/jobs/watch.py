"""What every worker does for all jobs: hands over those whose time has come, and takes away those nobody attends to."""

import logging
import time
from collections.abc import Callable, Collection, Mapping

from redis.client import Pipeline

from shared.errors import Unavailable
from trainer_service.jobs.events import JobState, StateChanged, TimedEvent
from trainer_service.jobs.job_store import OpenJob
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import Fields, JobRecord, attempt_of

logger = logging.getLogger(__name__)

# A job without a lease is given up only after so long: where Redis was gone, its process is about to renew it.
GRACE_S = 2.0
# Whoever looks again only after so long was frozen, and those whom it watches perhaps with it.
LATE_S = 4.0

# A job and the number of an attempt.
AttemptName = tuple[str, int]


class Watch:
    """Looks at the jobs again and again.

    Spans of time are measured by this process's own clock, from the moment at which it first saw what lasts: setting
    the time of day, here or at Redis, neither holds a job up nor gives one up. It is to look every second or so: after
    a longer pause it gives nobody up for what it did not see.
    """

    def __init__(self, queue: JobQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._looked_s = clock()
        # What was seen of an attempt, and since when it has not changed.
        self._waiting_since_s: dict[AttemptName, float] = {}
        self._unchanged_since_s: dict[tuple[AttemptName, str], float] = {}

    def look(self) -> set[AttemptName]:
        """Does what is due now; the attempts that are given up. Raises `Unavailable` where Redis does not answer."""
        before_s, self._looked_s = self._looked_s, self._clock()
        if self._looked_s - before_s > LATE_S:
            self._unchanged_since_s.clear()
        try:
            jobs = self._queue.store.open_jobs()
            self._send_ready(jobs)
            given_up = self._unattended(jobs)
            for job_id, attempt in given_up:
                if self._queue.lose(job_id, attempt, "The process that worked on the job is gone, or stuck"):
                    logger.warning("job %s: attempt %d is given up", job_id, attempt)
            return given_up
        except Unavailable:
            # Redis may be restarting; leases are renewed when it is back, and nobody is given up before.
            self._unchanged_since_s.clear()
            raise

    def _send_ready(self, jobs: Mapping[str, OpenJob]) -> None:
        """Hands over the jobs whose time has come, and ends those that wait for one that can finish no more."""
        now_s = self._clock()
        waiting = {(job_id, job.attempt): job for job_id, job in jobs.items() if not job.is_sent}
        self._waiting_since_s = {name: self._waiting_since_s.get(name, now_s) for name in waiting}
        for name, job in waiting.items():
            if now_s - self._waiting_since_s[name] >= _delay_s(job.fields):
                self._send_if_ready(name, job)

    def _send_if_ready(self, name: AttemptName, job: OpenJob) -> None:
        job_id, attempt = name
        # Once a job has begun it waits for no other.
        after = [] if "sent" in job.fields else job.fields.get("after", "").split()
        others = dict(zip(after, self._queue.store.read(after), strict=True))
        if lost := [name for name, other in others.items() if _can_finish_no_more(other)]:
            reason = f"The job {lost[0]}, which comes before it, has not finished."
            self._queue.tell(job_id, attempt, [TimedEvent(StateChanged(JobState.CANCELLED, reason))])
        elif all(other and other.state is JobState.FINISHED for other in others.values()):
            store, place = self._queue.store, self._queue.store.place(job_id)

            def send_once(pipeline: Pipeline, now: Fields) -> None:
                if attempt_of(now, "sent") != attempt:
                    store.send(pipeline, job_id, attempt, place)

            store.change(job_id, attempt, send_once)

    def _unattended(self, jobs: Mapping[str, OpenJob]) -> set[AttemptName]:
        """The attempts that were handed over, but neither wait in the line nor have renewed their lease for so long."""
        in_line: Collection[AttemptName] = set(self._queue.line.attempts())
        now_s, unchanged, given_up = self._clock(), {}, set()
        for job_id, job in jobs.items():
            name = (job_id, job.attempt)
            if not job.is_sent or name in in_line:
                continue
            seen = (name, job.lease.beat if job.lease else "")
            unchanged[seen] = self._unchanged_since_s.get(seen, now_s)
            if now_s - unchanged[seen] >= (job.lease.seconds if job.lease else 0) + GRACE_S:
                given_up.add(name)
        self._unchanged_since_s = unchanged
        return given_up


def _delay_s(fields: Fields) -> float:
    try:
        return float(fields.get("delay_s", 0))
    except ValueError:
        return 0.0


def _can_finish_no_more(record: JobRecord | None) -> bool:
    return record is None or record.state in (JobState.FAILED, JobState.CANCELLED)
