"""A run survives the death of any process and ends with the same bits as an undisturbed run."""

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
from shared.registry.registry import Checkpoint
from tests.end_to_end.conftest import PROJECT, TINY, Result, System, children, is_gone, is_progress
from tests.registries import run_folder
from tests.trainer_service.story_sets import add_stories, tales
from tests.waiting import wait_until
from trainer_service.jobs.events import JobState, Progress, RunStarted, StateChanged, TimedEvent
from trainer_service.jobs.requests import EvaluateRequest, PrepareRequest, TrainRequest
from trainer_service.jobs.rq_adapter import JOB_FUNCTION

pytestmark = pytest.mark.slow

# With random numbers in every step, and both optimizers: with Muon, AdamW updates the rest.
VALUES = TINY | {"context_length": "64", "dropout": "0.1", "optimizer": "muon"}
# A run takes this long on any machine, so that a test can act before it ends.
RUN_S = 6.0
FEWEST_STEPS = 240


@dataclass(frozen=True)
class Run:
    """A run that is evaluated every `interval` steps, four times, and at its end."""

    text: str
    interval: int

    @property
    def max_steps(self) -> int:
        return 4 * self.interval + 10

    @property
    def under_way(self) -> int:
        """The step from which a test acts: the run has a state, and most of its steps are ahead."""
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
    """A run on little text, whose tokenizer is trained quickly, that takes `RUN_S` on this machine."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    numbers = random.Random(0)
    path.write_text(" ".join(str(numbers.randrange(1000)) for _ in range(20_000)))
    probe = Run(str(path), FEWEST_STEPS // 4)
    job = put(system, probe)
    system.finish(job)
    first, *_, last = (timed for timed in system.events(job) if isinstance(timed.event, Progress))
    steps_per_s = probe.max_steps / (last.time - first.time)
    return Run(probe.text, max(probe.interval, round(RUN_S * steps_per_s / 4)))


def put(system: System, run: Run, *after: str, **values: str) -> str:
    """Enqueues the run, optionally after other jobs."""
    request = TrainRequest(dataset=(run.text,), overrides=run.values | values, after=after)
    return system.trainer.submit(request).job.id


@pytest.fixture(scope="module")
def reference(system: System, run: Run) -> Result:
    """The result of an undisturbed run."""
    job = put(system, run)
    system.finish(job)
    result = system.result(job)
    assert sorted(result.weights) == [*range(run.interval, run.max_steps, run.interval), run.max_steps]
    assert result.last_step == run.max_steps
    return result


def begin(system: System, run: Run) -> str:
    """Returns a job that is under way."""
    job = put(system, run)
    system.watch(job, is_progress(run.under_way))
    return job


def check_end(system: System, job: str, reference: Result, attempts: int) -> list[TimedEvent]:
    """Checks that the job finishes after this many attempts with the bits of the reference; returns its events."""
    ended = system.end(job)
    assert (ended.state, ended.attempt, ended.reason) == (pb.JOB_STATE_FINISHED, attempts, "")
    result = system.result(job)
    assert (result.last_step, result.state) == (reference.last_step, reference.state)
    # Versions of other runs may have displaced some in the registry; the state always has the last weights.
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
    """Returns the events from the moment at which the first attempt was given up."""
    returns = (i for i, timed in enumerate(events) if i and states([timed]) == [JobState.QUEUED])
    return events[next(returns) :]


def check_order(events: list[TimedEvent]) -> None:
    """Checks the order: the loss of the worker is noticed, the job starts again, and it takes further steps."""
    noticed, *rest = taken_over(events)
    assert states(rest) == [JobState.RUNNING, JobState.FINISHED]
    stepped = next(timed for timed in rest if isinstance(timed.event, Progress))
    assert noticed.time < stepped.time


def test_a_worker_that_is_asked_to_stop_returns_its_run(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.pid("worker"), signal.SIGTERM)
    events = check_end(system, job, reference, attempts=2)
    assert taken_over(events)[0].event == StateChanged(
        JobState.QUEUED, "The worker was stopped; the job resumes when a worker is back."
    )


def test_a_killed_training_process_is_replaced(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.training_process(), signal.SIGKILL)
    events = check_end(system, job, reference, attempts=2)
    lost = taken_over(events)[0].event
    assert isinstance(lost, StateChanged) and "killed by signal 9" in lost.reason


def test_a_taught_run_that_is_killed_once_its_teacher_is_gone_ends_with_the_same_bits(
    system: System, run: Run, reference: Result
) -> None:
    teacher = system.registry.labels()["latest"]
    request = TrainRequest(teachers=(str(teacher),), force=True)
    whole, killed = (system.trainer.submit(request).job.id for _ in range(2))
    system.finish(whole)
    system.watch(killed, is_progress(run.under_way))
    system.registry.remove(Checkpoint(teacher))
    os.kill(system.training_process(), signal.SIGKILL)
    undisturbed = system.result(whole)
    assert undisturbed.last_step == run.max_steps and undisturbed.state != reference.state
    check_end(system, killed, undisturbed, attempts=2)


def test_a_run_on_stories_that_is_killed_once_their_set_has_grown_ends_with_the_same_bits(
    system: System, run: Run, reference: Result
) -> None:
    add_stories(system.directories.data, tales(0, 60))
    request = TrainRequest(dataset=(run.text, "teacher:bedtime"), overrides=run.values | {"teacher_prompts": "true"})
    whole, killed = (system.trainer.submit(request).job.id for _ in range(2))
    system.finish(whole)
    add_stories(system.directories.data, tales(100, 20))
    system.watch(killed, is_progress(run.under_way))
    os.kill(system.training_process(), signal.SIGKILL)
    undisturbed = system.result(whole)
    assert undisturbed.last_step == run.max_steps and undisturbed.state != reference.state
    check_end(system, killed, undisturbed, attempts=2)


def test_the_training_process_of_a_killed_worker_ends_and_another_continues(
    system: System, run: Run, reference: Result
) -> None:
    job = begin(system, run)
    worker, process = system.pid("worker"), system.training_process()
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: is_gone(process))
    check_order(check_end(system, job, reference, attempts=2))


def test_a_run_survives_the_death_of_redis(system: System, run: Run, reference: Result) -> None:
    job = begin(system, run)
    os.kill(system.pid("redis"), signal.SIGKILL)
    check_end(system, job, reference, attempts=1)


@dataclass(frozen=True)
class Outage:
    """Three concurrent jobs. Of the first, the worker and the training process were killed together; of the second, the
    training process was stopped; of the third, both were stopped until the job had started on another worker."""

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
    """Runs a second worker, beside that of the supervisor, and gives its pid."""
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
    """Returns the job that a worker takes."""
    worker = registered(system, pid)
    assert worker is not None
    wait_until(lambda: worker.get_current_job_id() is not None)
    wait_until(lambda: bool(children(pid)))
    return str(worker.get_current_job_id()).split("-")[1]


def registered(system: System, pid: int) -> BaseWorker | None:
    """Returns a worker as RQ knows it, or None before it is registered."""
    return next((each for each in Worker.all(queue=system.queue.attempts.rq) if each.pid == pid), None)


def wait_for_each(system: System, run: Run, *jobs: str) -> Iterator[str]:
    """Yields each job as soon as it is under way."""
    waiting = set(jobs)
    while waiting:
        wait_until(lambda: any(system.step(job) >= run.under_way for job in waiting))
        yield (found := next(job for job in waiting if system.step(job) >= run.under_way))
        waiting.remove(found)


def freeze(system: System, job: str, *pids: int) -> None:
    """Stops processes at a moment at which they hold no lock of the registry."""
    root = system.directories.registry
    locks = (root / "versions.lock", root / "staging.lock", run_folder(system.registry, system.run(job)) / "lock")
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if not any(is_locked(lock) for lock in locks):
            return
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def test_jobs_of_several_workers_run_concurrently(system: System, outage: Outage) -> None:
    events = [system.events(job) for job in (outage.killed, outage.stuck, outage.frozen)]
    begun = [next(timed.time for timed in each if states([timed]) == [JobState.RUNNING]) for each in events]
    last_steps = [[timed.time for timed in each if isinstance(timed.event, Progress)][-1] for each in events]
    assert max(begun) < min(last_steps)


def test_a_worker_and_its_process_that_are_killed_together_are_replaced(
    system: System, reference: Result, outage: Outage
) -> None:
    check_order(check_end(system, outage.killed, reference, attempts=2))


def test_a_stuck_training_process_loses_its_run_and_ends(system: System, reference: Result, outage: Outage) -> None:
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
    return int((run_folder(system.registry, system.run(job)) / "fence").read_text())


def test_jobs_of_other_programs_are_dropped_and_never_imported(system: System, run: Run, tmp_path: Path) -> None:
    worker, ran = system.pid("worker"), tmp_path / "ran"
    finished = next(system.queue.store.jobs([JobState.FINISHED])).id
    queue = Queue(system.queue.store.keys.queue_name, connection=system.redis, serializer=JSONSerializer)
    strangers = [
        queue.enqueue("os.system", f"touch '{ran}'"),
        # Its import prints a text.
        queue.enqueue("this.s"),
        queue.enqueue(JOB_FUNCTION, args=(finished, 1), on_success=Callback("this.s")),
    ]
    system.finish(put(system, run, max_steps="1"))
    log = (system.directories.log / "worker.log").read_text()
    assert not ran.exists() and "The Zen of Python" not in log
    assert all(f"'{stranger.id}' in the queue is not a job of this project" in log for stranger in strangers)
    assert (queue.count, system.pid("worker")) == (0, worker)


@dataclass(frozen=True)
class AllKilled:
    """A run during which every process was killed, and two chains of jobs that waited; the first job of `failing`
    fails."""

    run: str
    chain: list[str]
    failing: list[str]


@pytest.fixture(scope="module")
def all_killed(system: System, run: Run, tmp_path_factory: pytest.TempPathFactory) -> AllKilled:
    text = Path(shutil.copy(run.text, tmp_path_factory.mktemp("gone") / "text.txt"))
    job = begin(system, run)
    prepare = system.trainer.submit(PrepareRequest(dataset=(run.text,), overrides=run.values)).job.id
    train = put(system, run, prepare, max_steps="10")
    evaluate = system.trainer.submit(EvaluateRequest(after=(train,), speed=False)).job.id
    fail = put(system, replace(run, text=str(text)))
    text.unlink()
    measure = system.trainer.submit(EvaluateRequest(after=(fail,), speed=False)).job.id
    # The worker comes before the training process, whose end it would otherwise report.
    pids = [system.pid(name) for name in ("supervisord", "worker", "redis", "trainer", "inference")]
    pids.append(system.training_process())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: all(map(is_gone, pids)))
    system.stack.up(lambda _: None)
    return AllKilled(job, [prepare, train, evaluate], [fail, measure])


def test_jobs_that_come_after_others_run_in_their_order(system: System, all_killed: AllKilled) -> None:
    jobs = [system.end(job) for job in all_killed.chain]
    assert [(job.state, job.reason) for job in jobs] == 3 * [(pb.JOB_STATE_FINISHED, "")]
    times = [time for job in jobs for time in (job.started_at.ToNanoseconds(), job.ended_at.ToNanoseconds())]
    assert times == sorted(times)
    assert jobs[-1].evaluation.validation_loss > 0


def test_jobs_after_a_failed_job_are_cancelled_with_a_reason(system: System, all_killed: AllKilled) -> None:
    failed, cancelled = (system.end(job) for job in all_killed.failing)
    assert (failed.state, cancelled.state) == (pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)
    assert cancelled.reason == f"The job {failed.id}, which comes before it, has not finished."
    assert not cancelled.HasField("started_at")


def test_a_run_continues_by_itself_after_every_process_was_killed(
    system: System, reference: Result, all_killed: AllKilled
) -> None:
    check_end(system, all_killed.run, reference, attempts=2)
