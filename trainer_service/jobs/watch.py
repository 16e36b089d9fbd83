"""The watch that every worker keeps over all jobs: hands over jobs that are due, and takes lost ones away."""

import logging
import time
from collections.abc import Callable, Collection, Sequence

from shared.errors import Unavailable
from shared.service.log_ids import with_ids
from trainer_service.jobs.events import JobState, StateChanged, TimedEvent
from trainer_service.jobs.queue import LONGEST_PAUSE_S, JobQueue
from trainer_service.jobs.records import JobRecord

logger = logging.getLogger(__name__)

# A job is lost when its lease has expired for this long: after an outage of Redis its process renews it soon.
GRACE_S = 2.0
# A watch that looks again after more than this was frozen, perhaps together with the processes that it watches.
LATE_S = 4.0

# A job and the number of an attempt.
AttemptName = tuple[str, int]


class Watch:
    """Looks at all open jobs about every second.

    Measures time by the monotonic clock of this process, from the moment at which it first sees a state: setting the
    time of day, here or on the Redis server, neither delays a job nor gives one up. After a longer pause it gives no
    job up for what it did not see. Only a job that is paused until a time of day waits for that time.
    """

    def __init__(
        self,
        queue: JobQueue,
        clock: Callable[[], float] = time.monotonic,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._queue = queue
        self._clock = clock
        self._time_of_day = time_of_day
        self._looked_s = clock()
        # Since when an attempt has waited, and since when its lease has not changed.
        self._waiting_since_s: dict[AttemptName, float] = {}
        self._unchanged_since_s: dict[tuple[AttemptName, str], float] = {}

    def look(self) -> set[AttemptName]:
        """Does what is due, and returns the attempts that it gives up; raises `Unavailable` without Redis."""
        before_s, self._looked_s = self._looked_s, self._clock()
        if self._looked_s - before_s > LATE_S:
            self._unchanged_since_s.clear()
        try:
            jobs = self._queue.store.open_jobs()
            self._send_due(jobs)
            given_up = self._find_lost(jobs)
            for job_id, attempt in given_up:
                if self._queue.lose(job_id, attempt, "The process of the job is gone or stuck"):
                    logger.warning("job %s: attempt %d is given up", job_id, attempt, extra=with_ids(job=job_id))
            return given_up
        except Unavailable:
            # Redis may be restarting: leases are renewed when it is back, so measure them from then.
            self._unchanged_since_s.clear()
            raise

    def _send_due(self, jobs: Sequence[JobRecord]) -> None:
        now_s = self._clock()
        waiting = {(job.id, job.attempt): job for job in jobs if job.sent != job.attempt and not job.is_suspended}
        self._waiting_since_s = {name: self._waiting_since_s.get(name, now_s) for name in waiting}
        for name, job in waiting.items():
            if now_s - self._waiting_since_s[name] >= job.delay_s and self._pause_is_over(job):
                self._send_if_ready(job)

    def _pause_is_over(self, job: JobRecord) -> bool:
        """Whether a job is not paused, or its time has come, or the time of day was set back since."""
        return job.until is None or not 0 < job.until - self._time_of_day() <= LONGEST_PAUSE_S

    def _send_if_ready(self, job: JobRecord) -> None:
        """Hands a job over if the jobs before it have finished, and cancels it if one of them cannot finish."""
        # A job that has begun waits for no other.
        after = job.after if job.sent is None else ()
        others = dict(zip(after, self._queue.store.read(after), strict=True))
        if failed := [other_id for other_id, other in others.items() if _cannot_finish(other)]:
            reason = f"The job {failed[0]}, which comes before it, has not finished."
            self._queue.store.report(job.id, job.attempt, [TimedEvent(StateChanged(JobState.CANCELLED, reason))])
        elif all(other and other.state is JobState.FINISHED for other in others.values()):
            self._queue.send_ready(job)

    def _find_lost(self, jobs: Sequence[JobRecord]) -> set[AttemptName]:
        """Returns the attempts that were handed over, but neither wait for a worker nor renew their lease."""
        waiting: Collection[AttemptName] = set(self._queue.attempts.waiting())
        now_s, unchanged, lost = self._clock(), {}, set()
        for job in jobs:
            name = (job.id, job.attempt)
            if job.sent != job.attempt or name in waiting:
                continue
            seen = (name, job.lease.beat if job.lease else "")
            unchanged[seen] = self._unchanged_since_s.get(seen, now_s)
            if now_s - unchanged[seen] >= (job.lease.seconds if job.lease else 0) + GRACE_S:
                lost.add(name)
        self._unchanged_since_s = unchanged
        return lost


def _cannot_finish(record: JobRecord | None) -> bool:
    return record is None or record.state in (JobState.FAILED, JobState.CANCELLED)
