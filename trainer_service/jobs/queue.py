"""The queue of jobs of one registry: decides when each attempt at a job is handed to the workers, and when a job ends.

Every attempt at a job has a number, and RQ hands each attempt to a worker.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from redis import Redis
from redis.client import Pipeline

from shared.errors import AlreadyExists, FailedPrecondition, shown
from trainer_service.jobs.events import Evaluation, JobState, Preparation, RunStarted, StateChanged, TimedEvent
from trainer_service.jobs.job_store import LEASE_S, MAX_TICKET, START_LEASE_S, JobStore, ticket_of
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.records import SUSPENDED, Fields, JobRecord, attempt_of, last_event, number_of
from trainer_service.jobs.rq_adapter import AttemptQueue
from trainer_service.jobs.specs import Kind, Spec, TrainSpec
from trainer_service.redis_client import reachable

# Delays before the next attempt after a crash; after one crash more, the job fails. The count starts again if the run
# has made progress since its last crash.
BACKOFF_S = (0.0, 10.0, 60.0)
# The longest pause of a job; one that is due later means that the clock was set back.
LONGEST_PAUSE_S = 24 * 3600.0
# A worker takes one of the first attempts, as a rule.
_READ_AT_ONCE = 50


class JobQueue:
    """Puts jobs on the queue and ends their attempts. Loads no model framework.

    `store` has the jobs and the workers, and `attempts` the attempts that wait for a worker. Every method raises
    `Unavailable` if Redis does not answer.
    """

    def __init__(self, connection: Redis, registry: str) -> None:
        self.registry = registry
        self.store = JobStore(connection, registry)
        self.attempts = AttemptQueue(connection, self.store.keys)

    def enqueue(self, spec: Spec, after: Sequence[str] = ()) -> JobRecord:
        """Puts a job at the end of the queue; it can run when the jobs in `after` have finished.

        Raises `NotFound` or `FailedPrecondition` if one of those does not exist or can no longer finish, and
        `AlreadyExists` if another run has the same name.
        """
        for other in after:
            if self.store.get(other).state in (JobState.FAILED, JobState.CANCELLED):
                raise FailedPrecondition(f"The job {other} has not finished, so nothing can come after it.")
        job_id = secrets.token_hex(4)
        fields: dict[Any, Any] = {
            "kind": spec.kind.value,
            "spec": spec.to_json(),
            "run": spec.run,
            "after": " ".join(after),
            "enqueued_at": time.time(),
            "attempt": 1,
        }

        def add(pipeline: Pipeline) -> None:
            if spec.kind is Kind.TRAIN:
                self._refuse_taken(spec.run)
            # A score above is none of ours.
            last: Any = pipeline.zrevrangebyscore(self.store.keys.jobs, MAX_TICKET - 1, 0, 0, 1, withscores=True)
            ticket = ticket_of(last[0][1]) + 1 if last else 1
            pipeline.multi()
            pipeline.hset(self.store.keys.job(job_id), mapping=fields)
            pipeline.zadd(self.store.keys.jobs, {job_id: ticket})
            pipeline.zadd(self.store.keys.open, {job_id: ticket})
            self.store.add_events(pipeline, job_id, [TimedEvent(StateChanged(JobState.QUEUED))], {})
            if not after:
                self.attempts.insert(pipeline, job_id, 1, ticket)

        with reachable(self.store.redis):
            while self.store.redis.exists(self.store.keys.job(job_id)):
                job_id = secrets.token_hex(4)
            self.store.redis.transaction(add, self.store.keys.jobs, self.attempts.key)
        return self.store.get(job_id)

    def _refuse_taken(self, run: str) -> None:
        found = cast(list[bytes], self.store.redis.zrange(self.store.keys.jobs, 0, -1))
        ids = [job_id.decode(errors="replace") for job_id in found]
        pipeline = self.store.redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hmget(self.store.keys.job(job_id), ["run", "state", RunStarted.__name__])
        answers = pipeline.execute(raise_on_error=False)
        for job_id, answer in zip(ids, answers, strict=True):
            if isinstance(answer, Exception):
                continue  # an invalid job has no run
            name, state, started = answer
            never_ran = started is None and state in (b"failed", b"cancelled")
            if name == run.encode() and not never_ran:
                raise AlreadyExists(f"The job {job_id} has a run named {shown(run)} already; choose another name.")

    def cancel(self, job_id: str) -> JobRecord:
        """Cancels a job: ends a queued one, and asks a running one to end.

        Raises `NotFound`, or `FailedPrecondition` if the job has ended.
        """
        self.store.get(job_id)

        def change(pipeline: Pipeline, fields: Fields) -> None:
            waiting = fields["state"] == JobState.QUEUED.value
            state = JobState.CANCELLED if waiting else JobState.CANCELLING
            pipeline.hset(self.store.keys.job(job_id), "cancel", "1")
            self.store.add_events(pipeline, job_id, [TimedEvent(StateChanged(state))], fields)

        if not self.store.change(job_id, None, change):
            raise FailedPrecondition(f"The job {job_id} is {self.store.get(job_id).state.value} already.")
        record = self.store.get(job_id)
        self.attempts.remove(job_id, record.attempt)
        return record

    def send_ready(self, job: JobRecord) -> None:
        """Hands the latest attempt of a job to the workers, unless that has been done."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if attempt_of(fields, "sent") != job.attempt:
                self.attempts.insert(pipeline, job.id, job.attempt, job.ticket)

        self.store.change(job.id, job.attempt, change, also_watch=[self.attempts.key])

    def claim(self, job_id: str) -> int | None:
        """Takes the attempt of one job that waits for a worker, and gives it the lease of a starting process.

        Returns its number, or None if no attempt waits now. Of several processes that want it, workers included, one
        gets it. Raises `NotFound`, or `FailedPrecondition` if the job has ended.
        """
        record = self.store.get(job_id)
        if record.state.is_final:
            raise FailedPrecondition(f"The job {job_id} is {record.state.value} already, so nothing is left to do.")
        if not self._take(job_id, record.attempt, START_LEASE_S):
            return None
        self.attempts.forget(job_id, record.attempt)
        return record.attempt

    def take(self, offer: Offer) -> tuple[str, int] | None:
        """Takes the first waiting attempt, in the order of tickets, whose needs a worker meets, and lends it to it.

        The lease is short: the worker starts a process at once, and renews it. Attempts that it cannot do stay for
        others. Returns the job and the number of the attempt, or None if there is none.
        """
        waiting = self.attempts.waiting()
        for start in range(0, len(waiting), _READ_AT_ONCE):
            some = waiting[start : start + _READ_AT_ONCE]
            records = self.store.read_alone([job_id for job_id, _ in some])
            for (job_id, attempt), record in zip(some, records, strict=True):
                if record is None or record.state.is_final or record.attempt != attempt:
                    self.attempts.remove(job_id, attempt)  # a process was killed before it could
                elif offer.meets(record.needs) and self._take(job_id, attempt, LEASE_S):
                    return job_id, attempt
        return None

    def _take(self, job_id: str, attempt: int, lease_s: int) -> bool:
        """Takes an attempt out of the queue and gives it a lease in one transaction; returns whether it waited."""
        is_waiting = False

        def change(pipeline: Pipeline, _: Fields) -> None:
            nonlocal is_waiting
            is_waiting = (job_id, attempt) in self.attempts.waiting()
            if is_waiting:
                self.attempts.take(pipeline, job_id, attempt)
                self.store.lend(pipeline, job_id, attempt, lease_s)

        return self.store.change(job_id, attempt, change, also_watch=[self.attempts.key]) and is_waiting

    def give_back(self, job_id: str, attempt: int) -> bool:
        """Ends an attempt whose worker was stopped; any worker can take the next attempt at once."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if not self._end_cancelled(pipeline, job_id, fields):
                reason = "The worker was stopped; the job resumes when a worker is back."
                self._next_attempt(pipeline, job_id, attempt, reason, 0.0, fields)

        return self.store.change(job_id, attempt, change, also_watch=[self.attempts.key])

    def pause(self, job_id: str, attempt: int, until: float, reason: str) -> bool:
        """Ends an attempt that can go on only at a time, in seconds since the epoch; the next one follows then.

        The worker can take other jobs meanwhile. No pause is longer than `LONGEST_PAUSE_S`.
        """
        now = time.time()
        until = min(max(until, now), now + LONGEST_PAUSE_S)
        at = time.strftime("%H:%M:%S on %A, %d %B (%Z)", time.localtime(until))

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if not self._end_cancelled(pipeline, job_id, fields):
                text = f"{reason} The job goes on at {at}."
                self._next_attempt(pipeline, job_id, attempt, text, 0.0, fields, until)

        return self.store.change(job_id, attempt, change, also_watch=[self.attempts.key])

    def suspend(self, job_id: str, attempt: int, evaluation: Evaluation) -> bool:
        """Ends an attempt at a training job that has come to its step `until`; the next one follows after `extend`.

        `evaluation` is that of the step, which the job then has, even if its event was lost with an earlier process.
        """

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if self._end_cancelled(pipeline, job_id, fields):
                return
            last = last_event(Evaluation, fields)
            if last is None or last.step != evaluation.step:
                self.store.add_events(pipeline, job_id, [TimedEvent(evaluation)], fields)
            pipeline.hset(self.store.keys.job(job_id), SUSPENDED, "1")
            self._next_attempt(pipeline, job_id, attempt, f"Waits at step {evaluation.step:,}.", None, fields)

        return self.store.change(job_id, attempt, change)

    def extend(self, job: JobRecord, until: int) -> None:
        """Lets a suspended training job go on to a later step; does nothing if it goes on or has ended already."""
        spec = job.spec
        assert isinstance(spec, TrainSpec)

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if SUSPENDED not in fields:
                return
            key = self.store.keys.job(job.id)
            pipeline.hset(key, "spec", replace(spec, until=until).to_json())
            pipeline.hdel(key, SUSPENDED)
            event = StateChanged(JobState.QUEUED, f"Goes on to step {until:,}.")
            self.store.add_events(pipeline, job.id, [TimedEvent(event)], fields)
            self.attempts.insert(pipeline, job.id, job.attempt, job.ticket)

        self.store.change(job.id, job.attempt, change, also_watch=[self.attempts.key])

    def stop(self, job: JobRecord, reason: str) -> None:
        """Cancels a suspended training job; does nothing if it goes on or has ended already."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if SUSPENDED in fields:
                self.store.add_events(pipeline, job.id, [TimedEvent(StateChanged(JobState.CANCELLED, reason))], fields)

        self.store.change(job.id, job.attempt, change)

    def lose(self, job_id: str, attempt: int, reason: str) -> bool:
        """Ends an attempt that crashed; the next one follows after a delay, unless the job has crashed too often."""

        def change(pipeline: Pipeline, fields: Fields) -> None:
            if self._end_cancelled(pipeline, job_id, fields):
                return
            step = _saved(fields)
            before = number_of(fields.get("crash_step", ""))
            has_progressed = before is None or step > before
            crashes = 1 if has_progressed else 1 + (number_of(fields.get("crashes", "")) or 0)
            pipeline.hset(self.store.keys.job(job_id), mapping={"crashes": crashes, "crash_step": step})
            if crashes > len(BACKOFF_S):
                event = StateChanged(JobState.FAILED, f"{reason}. The job crashed {crashes} times without progress.")
                self.store.add_events(pipeline, job_id, [TimedEvent(event)], fields)
            else:
                delay_s = BACKOFF_S[crashes - 1]
                when = f"in {delay_s:.0f} s" if delay_s else "now"
                text = f"{reason}. The job resumes from its last state {when}."
                self._next_attempt(pipeline, job_id, attempt, text, delay_s, fields)

        return self.store.change(job_id, attempt, change, also_watch=[self.attempts.key])

    def _next_attempt(
        self,
        pipeline: Pipeline,
        job_id: str,
        attempt: int,
        reason: str,
        delay_s: float | None,
        fields: Fields,
        until: float | None = None,
    ) -> None:
        """Ends an attempt; the next one follows after a delay or at a time. Without a delay it waits for `extend`."""
        due: dict[Any, Any] = {"attempt": attempt + 1, "delay_s": delay_s or 0.0, "until": until or ""}
        pipeline.hset(self.store.keys.job(job_id), mapping=due)
        pipeline.delete(self.store.keys.lease(job_id))
        self.store.add_events(pipeline, job_id, [TimedEvent(StateChanged(JobState.QUEUED, reason))], fields)
        if delay_s == 0 and until is None:
            self.attempts.insert(pipeline, job_id, attempt + 1, self.store.get(job_id).ticket)

    def _end_cancelled(self, pipeline: Pipeline, job_id: str, fields: Fields) -> bool:
        """Ends a cancelled job whose process is gone; returns whether the job was cancelled."""
        if "cancel" in fields:
            self.store.add_events(pipeline, job_id, [TimedEvent(StateChanged(JobState.CANCELLED))], fields)
        return "cancel" in fields


def _saved(fields: Fields) -> int:
    """Returns how far the work of earlier attempts was saved when the last attempt began."""
    if fields.get("kind") == Kind.STORIES.value:
        # Every story is saved at once.
        preparation = last_event(Preparation, fields)
        return round(1e6 * (preparation.fraction or 0)) if preparation else 0
    started = last_event(RunStarted, fields)
    return started.first_step if started else 0
