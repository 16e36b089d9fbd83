"""Whatever is killed or stopped, a run goes on and ends with the bits that it would have had anyway."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rq import Callback, Queue, Worker
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker

from shared.pb.training.v1 import training_pb2 as pb
from shared.registry.commit import is_locked
from tests.end_to_end.conftest import PROJECT, TINY, Result, System, children, is_gone, is_progress
from tests.waiting import wait_until
from trainer_service.jobs.events import JobState, Progress, RunStarted, StateChanged, TimedEvent
from trainer_service.jobs.rq_adapter import JOB_FUNCTION

pytestmark = pytest.mark.slow

# With random numbers in every step.
VALUES = TINY | {"context_length": "64", "dropout": "0.1"}
# A run takes so long, however fast the machine is: what is done to it must not come after its end.
RUN_S = 6.0
FEWEST_STEPS = 240


@dataclass(frozen=True)
class Run:
    """A run that is evaluated four times on its way, `interval` steps apart, and at its end."""

    text: str
    interval: int

    @property
    def max_steps(self) -> int:
        return 4 * self.interval + 10

    @property
    def under_way(self) -> int:
        """A test acts from this step on: the run has a state, and most of it is still to come."""
        return self.interval + 5

    @property
    def values(self) -> dict[str, str]:
        steps = {
            "max_steps": self.max_steps,
            "evaluation_interval": self.interval,
            "report_interval": self.interval // 12,
        }
        return VALUES | {name: str(value) for name, value in steps.items()}


@pytest.fixture(scope="module")
def run(system: System, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """On so little text that its tokenizer is trained in a moment, and as long as it must be on this machine."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = random.Random(0)
    path.write_text(" ".join(str(numbers.randrange(1000)) for _ in range(20_000)))
    probe = Run(str(path), FEWEST_STEPS // 4)
    job = put(system, probe)
    system.finish(job)
    first, *_, last = (timed for timed in system.events(job) if isinstance(timed.event, Progress))
    steps_per_s = probe.max_steps / (last.time - first.time)
    return Run(probe.text, max(probe.interval, round(RUN_S * steps_per_s / 4)))


def put(system: System, run: Run, kind: pb.JobKind = pb.JOB_KIND_TRAIN, after: str = "", **values: str) -> str:
    """Enqueues the run, or a job of another kind, that may come after another one."""
    request = pb.EnqueueJobRequest(kind=kind, after=[after] if after else [])
    if kind != pb.JOB_KIND_EVALUATE:
        request.MergeFrom(pb.EnqueueJobRequest(dataset=[run.text], overrides=run.values | values))
    job: str = system.trainer.EnqueueJob(request).job.id
    return job


@pytest.fixture(scope="module")
def reference(system: System, run: Run) -> Result:
    """What the run leaves when nothing happens to it."""
    job = put(system, run)
    system.finish(job)
    result = system.result(job)
    assert sorted(result.weights) == [*range(run.interval, run.max_steps, run.interval), run.max_steps]
    assert result.last_step == run.max_steps
    return result


def begin(system: System, run: Run) -> str:
    """A job that is under way."""
    job = put(system, run)
    system.watch(job, is_progress(run.under_way))
    return job


def check_end(system: System, job: str, reference: Result, attempts: int) -> list[TimedEvent]:
    """The job finishes in so many attempts and with the reference's bits; its events."""
    ended = system.end(job)
    assert (ended.state, ended.attempt, ended.reason) == (pb.JOB_STATE_FINISHED, attempts, "")
    result = system.result(job)
    assert (result.last_step, result.state) == (reference.last_step, reference.state)
    # Versions of other runs may have pushed some out of the registry; the state holds the last weights in any case.
    assert result.weights.items() <= reference.weights.items()
    events = system.events(job)
    first_steps = [timed.event.first_step for timed in events if isinstance(timed.event, RunStarted)]
    assert len(first_steps) == attempts and first_steps[0] == 1
    assert all(step > min(reference.weights) for step in first_steps[1:])
    assert states(events)[-1] is JobState.FINISHED and states(events).count(JobState.FINISHED) == 1
    return events


def states(events: list[TimedEvent]) -> list[JobState]:
    return [timed.event.state for timed in events if isinstance(timed.event, StateChanged)]


def taken_over(events: list[TimedEvent]) -> list[TimedEvent]:
    """What was told from the moment on at which the first attempt was given up."""
    returns = (i for i, timed in enumerate(events) if i and states([timed]) == [JobState.QUEUED])
    return events[next(returns) :]


def check_order(events: list[TimedEvent]) -> None:
    """That the worker is gone is noticed, the job begins again and takes further steps, in this order."""
    noticed, *rest = taken_over(events)
    assert states(rest) == [JobState.RUNNING, JobState.FINISHED]
    stepped = next(timed for timed in rest if isinstance(timed.event, Progress))
    assert noticed.time < stepped.time


def test_a_worker_that_is_asked_to_stop_gives_its_run_back(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.pid("worker"), signal.SIGTERM)
    events = check_end(system, job, reference, attempts=2)
    assert taken_over(events)[0].event == StateChanged(
        JobState.QUEUED, "The worker was stopped; the job goes on when one is back."
    )


def test_a_training_process_that_is_killed_is_followed_by_another(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.training_process(), signal.SIGKILL)
    events = check_end(system, job, reference, attempts=2)
    lost = taken_over(events)[0].event
    assert isinstance(lost, StateChanged) and "killed by signal 9" in lost.reason


def test_the_training_process_of_a_killed_worker_ends_and_another_goes_on(
    system: System, run: Run, reference: Result
) -> None:
    job = begin(system, run)
    worker, process = system.pid("worker"), system.training_process()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: is_gone(process))
    check_order(check_end(system, job, reference, attempts=2))


def test_a_run_takes_no_notice_of_redis_being_killed(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.pid("redis"), signal.SIGKILL)
    check_end(system, job, reference, attempts=1)


@dataclass(frozen=True)
class Outage:
    """Three jobs side by side: the worker and the training process of one were killed at once; the training process of
    one was stopped; both were stopped of one, until the job had begun on another worker."""

    killed: str
    stuck: str
    stuck_process: int
    frozen: str
    frozen_log: str


@pytest.fixture(scope="module")
def outage(system: System, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Outage:
    logs = tmp_path_factory.mktemp("workers")
    with (
        second_worker(system, logs / "stuck.log") as stuck_worker,
        second_worker(system, logs / "log") as frozen_worker,
    ):
        killed_worker = system.pid("worker")
        for worker in (killed_worker, stuck_worker, frozen_worker):
            wait_until(lambda worker=worker: registered(system, worker) is not None)  # type: ignore[misc]
        for _ in range(3):
            put(system, run)
        killed, stuck, frozen = (job_of(system, worker) for worker in (killed_worker, stuck_worker, frozen_worker))
        (killed_process,), (stuck_process,), (frozen_process,) = map(
            children, (killed_worker, stuck_worker, frozen_worker)
        )
        for job in wait_for_each(system, run, killed, stuck, frozen):
            if job == stuck:
                freeze(system, job, stuck_process)
            elif job == frozen:
                freeze(system, job, frozen_process, frozen_worker)
            else:
                os.kill(killed_process, signal.SIGKILL)
                os.kill(killed_worker, signal.SIGKILL)
        wait_until(lambda: sum(isinstance(timed.event, RunStarted) for timed in system.events(frozen)) == 2)
        for pid in (frozen_process, frozen_worker):
            os.kill(pid, signal.SIGCONT)
        for job in (killed, stuck, frozen):
            system.end(job)
        wait_until(lambda: is_gone(frozen_process))
    return Outage(killed, stuck, stuck_process, frozen, (logs / "log").read_text())


@contextmanager
def second_worker(system: System, log: Path) -> Iterator[int]:
    """The pid of a worker beside the supervisor's."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer_service", "work"],
            cwd=PROJECT,
            env=system.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(30)


def job_of(system: System, pid: int) -> str:
    """The job that a worker takes."""
    worker = registered(system, pid)
    assert worker is not None
    wait_until(lambda: worker.get_current_job_id() is not None)
    wait_until(lambda: bool(children(pid)))
    return str(worker.get_current_job_id()).split("-")[1]


def registered(system: System, pid: int) -> BaseWorker | None:
    """A worker as RQ knows it, None before it does."""
    return next((each for each in Worker.all(queue=system.queue.line.rq) if each.pid == pid), None)


def wait_for_each(system: System, run: Run, *jobs: str) -> Iterator[str]:
    """Jobs, each when it is under way."""
    waiting = set(jobs)
    while waiting:
        wait_until(lambda: any(system.step(job) >= run.under_way for job in waiting))
        yield (found := next(job for job in waiting if system.step(job) >= run.under_way))
        waiting.remove(found)


def freeze(system: System, job: str, *pids: int) -> None:
    """Stops processes, though not while they hold a lock of the registry."""
    root = system.directories.registry
    locks = (root / "versions.lock", root / "staging.lock", system.registry.run_directory(system.run(job)) / "lock")
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if not any(is_locked(lock) for lock in locks):
            return
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def test_jobs_of_several_workers_run_side_by_side(system: System, outage: Outage) -> None:
    events = [system.events(job) for job in (outage.killed, outage.stuck, outage.frozen)]
    begun = [next(timed.time for timed in each if states([timed]) == [JobState.RUNNING]) for each in events]
    last_steps = [[timed.time for timed in each if isinstance(timed.event, Progress)][-1] for each in events]
    assert max(begun) < min(last_steps)


def test_a_worker_and_its_process_that_are_killed_at_once_are_replaced(
    system: System, reference: Result, outage: Outage
) -> None:
    check_order(check_end(system, outage.killed, reference, attempts=2))


def test_a_stuck_training_process_loses_its_run_and_its_life(system: System, reference: Result, outage: Outage) -> None:
    check_end(system, outage.stuck, reference, attempts=2)
    assert is_gone(outage.stuck_process)
    assert fence(system, outage.stuck) == 2


def test_a_worker_that_comes_back_after_another_took_its_job_cannot_write(
    system: System, reference: Result, outage: Outage
) -> None:
    events = check_end(system, outage.frozen, reference, attempts=2)
    given_up, *rest = taken_over(events)
    assert states(rest) == [JobState.RUNNING, JobState.FINISHED] and isinstance(rest[-1].event, StateChanged)
    assert all(timed.time >= given_up.time for timed in rest)
    steps = [timed.event.step for timed in rest if isinstance(timed.event, Progress)]
    assert steps == sorted(set(steps))
    assert fence(system, outage.frozen) == 2
    refusals = ("another attempt has taken over", "Another process took over the run")
    assert any(refusal in outage.frozen_log for refusal in refusals)


def fence(system: System, job: str) -> int:
    return int((system.registry.run_directory(system.run(job)) / "fence").read_text())


def test_what_is_no_job_of_this_project_is_dropped_unseen(system: System, run: Run, tmp_path: Path) -> None:
    worker, ran = system.pid("worker"), tmp_path / "ran"
    finished = next(system.queue.jobs([JobState.FINISHED])).id
    queue = Queue(system.queue.keys.queue_name, connection=system.redis, serializer=JSONSerializer)
    strangers = [
        queue.enqueue("os.system", f"touch '{ran}'"),
        # Whose import prints.
        queue.enqueue("this.s"),
        queue.enqueue(JOB_FUNCTION, args=(finished, 1), on_success=Callback("this.s")),
    ]
    system.finish(put(system, run, max_steps="1"))
    log = (system.directories.log / "worker.log").read_text()
    assert not ran.exists() and "The Zen of Python" not in log
    assert all(f"'{stranger.id}' in the queue is not a job of this project" in log for stranger in strangers)
    assert (queue.count, system.pid("worker")) == (0, worker)


@dataclass(frozen=True)
class PulledPlug:
    """A run in whose middle everything was killed, and jobs that waited meanwhile: two chains, the first job of one of
    which fails."""

    run: str
    chain: list[str]
    failing: list[str]


@pytest.fixture(scope="module")
def pulled_plug(system: System, run: Run, tmp_path_factory: pytest.TempPathFactory) -> PulledPlug:
    text = Path(shutil.copy(run.text, tmp_path_factory.mktemp("gone") / "text.txt"))
    job = begin(system, run)
    prepare = put(system, run, pb.JOB_KIND_PREPARE)
    train = put(system, run, pb.JOB_KIND_TRAIN, prepare, max_steps="10")
    evaluate = put(system, run, pb.JOB_KIND_EVALUATE, train)
    fail = put(system, replace(run, text=str(text)))
    text.unlink()
    measure = put(system, run, pb.JOB_KIND_EVALUATE, fail)
    pids = [system.training_process()]
    pids += [system.pid(name) for name in ("supervisord", "redis", "trainer", "inference", "worker")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, pids)))
    system.stack.up(lambda _: None)
    return PulledPlug(job, [prepare, train, evaluate], [fail, measure])


def test_jobs_that_come_after_others_run_in_their_order(system: System, pulled_plug: PulledPlug) -> None:
    jobs = [system.end(job) for job in pulled_plug.chain]
    assert [(job.state, job.reason) for job in jobs] == 3 * [(pb.JOB_STATE_FINISHED, "")]
    times = [time for job in jobs for time in (job.started_at.ToNanoseconds(), job.ended_at.ToNanoseconds())]
    assert times == sorted(times)
    assert jobs[-1].evaluation.validation_loss > 0


def test_what_comes_after_a_job_that_fails_is_cancelled_with_a_reason(system: System, pulled_plug: PulledPlug) -> None:
    failed, cancelled = (system.end(job) for job in pulled_plug.failing)
    assert (failed.state, cancelled.state) == (pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
    assert cancelled.reason == f"The job {failed.id}, which comes before it, has not finished."
    assert not cancelled.HasField("started_at")


def test_a_run_goes_on_by_itself_after_the_plug_was_pulled(
    system: System, reference: Result, pulled_plug: PulledPlug
) -> None:
    check_end(system, pulled_plug.run, reference, attempts=2)
