"""Runs of several ranks, from the queue on, with real workers, ranks, launchers and signals."""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.service.listening import free_port_numbers
from tests.end_to_end.conftest import is_gone
from tests.trainer_service.ranks.workplace import ENDLESS, Workplace, ranks_of
from tests.waiting import wait_until
from trainer_service.jobs.events import JobState

pytestmark = pytest.mark.slow

PYTHON = shlex.quote(sys.executable)
MLX_LAUNCH = shlex.quote(str(Path(sys.executable).with_name("mlx.launch")))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    place = Workplace(tmp_path_factory.mktemp("work"))
    yield place
    place.redis.end()


def test_two_ranks_train_a_run_that_others_continue(work: Workplace) -> None:
    with work.worker():
        first = work.end(work.enqueue())
        version = work.registry.versions()[-1].version
        later = work.end(work.resume(version, world_size="1", max_steps="12"))
        third = work.end(work.resume(version, world_size="2", max_steps="12"))
    assert [record.state for record in (first, later, third)] == [JobState.FINISHED] * 3, work.log()
    assert first.started and first.started.device.startswith("2 ranks on ")
    assert later.started and not later.started.device.startswith("2 ranks") and later.started.first_step == 10
    assert first.progress and first.progress.tokens == 9 * 2 * 16
    # Two ranks and one come to the same loss.
    assert later.evaluation and third.evaluation
    assert third.evaluation.validation_loss == pytest.approx(later.evaluation.validation_loss, rel=1e-4)
    assert {"rank=0", "rank=1"} <= {f"rank={each}" for each in "01" if f"rank={each}" in work.log()}


@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)])
def test_killed_ranks_are_named_and_the_run_goes_on(work: Workplace, victims: tuple[int, ...]) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS)
        work.wait_for_steps(job)
        ranks = ranks_of(worker.pid)
        for victim in victims:
            os.kill(ranks[victim], signal.SIGKILL)
        work.wait_for_steps(job, attempt=2)
        assert all(map(is_gone, ranks))
    (reason,) = work.reasons(job)
    assert reason.startswith(tuple(f"Rank {victim} was killed by SIGKILL" for victim in victims))
    assert reason.endswith("The job resumes from its last state now.")
    first, second = work.first_steps(job)
    assert first == 1 < second


def test_a_run_whose_ranks_are_killed_ends_as_an_undisturbed_one(work: Workplace) -> None:
    values = {"max_steps": "3000", "evaluation_interval": "300"}
    with work.worker() as worker:
        whole, killed = work.enqueue(**values), work.enqueue(**values)
        work.end(whole)
        for attempt, victims in ((1, [1]), (2, [0, 1])):
            work.wait_for_steps(killed, attempt)
            ranks = ranks_of(worker.pid)
            for victim in victims:
                os.kill(ranks[victim], signal.SIGKILL)
        assert work.end(killed).attempt == 3
    expected, found = (work.last_state(job) for job in (whole, killed))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_worker_that_is_asked_to_stop_returns_the_run_with_its_last_step(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS | {"evaluation_interval": "1000000"})
        work.wait_for_steps(job, saved=False)
        ranks = ranks_of(worker.pid)
        worker.terminate()
        assert worker.wait() == 0
        assert all(map(is_gone, ranks))
    assert work.reasons(job) == ["The worker was stopped; the job resumes when a worker is back."]
    record = work.record(job)
    assert record.spec and record.progress
    assert work.registry.states(record.spec.run) == [record.progress.step]


def test_a_cancelled_run_ends_in_all_ranks(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS)
        work.wait_for_steps(job, saved=False)
        ranks = ranks_of(worker.pid)
        work.queue.cancel(job)
        assert work.end(job).state is JobState.CANCELLED
        wait_until(lambda: all(map(is_gone, ranks)))
    assert work.reasons(job) == []


def test_the_ranks_of_a_killed_worker_end_and_return_the_run(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS)
        work.wait_for_steps(job)
        ranks = ranks_of(worker.pid)
        worker.kill()
        wait_until(lambda: all(map(is_gone, ranks)))
        with work.worker():
            work.wait_for_steps(job, attempt=2)
    assert work.first_steps(job)[1] > 1


def test_the_ranks_of_a_killed_coordinator_end(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS)
        work.wait_for_steps(job)
        ranks = ranks_of(worker.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        os.kill(coordinator_of(ranks[0]), signal.SIGKILL)
        work.wait_for_steps(job, attempt=2)
        assert all(map(is_gone, ranks))
    assert "The training process was killed by signal 9" in work.reasons(job)[0]


def coordinator_of(rank: int) -> int:
    return int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])


def test_the_lease_ends_a_run_whose_first_rank_is_stopped(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(**ENDLESS)
        work.wait_for_steps(job)
        ranks = ranks_of(worker.pid)
        os.kill(ranks[0], signal.SIGSTOP)
        work.wait_for_steps(job, attempt=2)
        assert all(map(is_gone, ranks))
    assert work.reasons(job) == ["The process of the job is gone or stuck. The job resumes from its last state now."]


def test_the_watchdogs_end_a_run_in_which_another_rank_is_stopped(work: Workplace) -> None:
    impatient = f"{PYTHON} -m tests.trainer_service.ranks.impatient {{world_size}}"
    with work.worker(GPTLOOP_LAUNCHER=impatient) as worker:
        # Watchdogs rest while rank 0 evaluates.
        job = work.enqueue(**ENDLESS | {"evaluation_interval": "1000000"})
        work.wait_for_steps(job, saved=False)
        ranks = ranks_of(worker.pid)
        os.kill(ranks[1], signal.SIGSTOP)
        work.wait_for_steps(job, attempt=2, saved=False)
        assert all(map(is_gone, ranks))
    (reason,) = work.reasons(job)
    assert reason.startswith("The launcher: Rank 0: No step ended within 2 s: another rank is stuck")


def test_an_error_while_preparing_fails_the_job_with_its_sentence(work: Workplace) -> None:
    with work.worker() as worker:
        job = work.enqueue(max_train_tokens="17")
        text = Path(work.text).read_text()
        Path(work.text).write_text("\0")
        try:
            record = work.end(job)
        finally:
            Path(work.text).write_text(text)
        assert worker.poll() is None
    assert record.state is JobState.FAILED and record.attempt == 1 and record.reason, record


@pytest.mark.parametrize(
    ("launcher", "sentence"),
    [
        ("/no/such/launcher -n {world_size}", "The launcher '/no/such/launcher' cannot be started: No such file"),
        (
            f"{PYTHON} -c 'import sys; sys.exit(\"no node is free\")'",
            "The launcher ended with exit code 1: 'no node is",
        ),
        (f"{PYTHON} -c pass", "The ranks ended without an end of the job"),
        ("env", "The launcher: No variable says which rank this process is: start it by mlx.launch, mpirun or srun"),
        ("env MLX_RANK=0 MLX_HOSTFILE=/none", "The launcher: MLX_HOSTFILE names '/none', which must be a list"),
    ],
)
def test_a_launcher_that_fails_is_the_reason(work: Workplace, launcher: str, sentence: str) -> None:
    with work.worker(GPTLOOP_LAUNCHER=launcher):
        job = work.enqueue()
        wait_until(lambda: bool(work.reasons(job)))
        work.queue.cancel(job)
    assert work.reasons(job)[0].startswith(sentence)


def test_a_launcher_with_another_number_of_ranks_fails_the_job(work: Workplace) -> None:
    with work.worker(GPTLOOP_LAUNCHER=f"{MLX_LAUNCH} -n 3 --"):
        record = work.end(work.enqueue())
    assert (record.state, record.reason) == (
        JobState.FAILED,
        "The job has world_size 2, but 3 ranks were started.",
    )


@pytest.mark.parametrize("given", [False, True])
def test_one_rank_alone_says_that_the_job_needs_more(work: Workplace, given: bool) -> None:
    job = work.enqueue()
    attempt = [str(work.queue.claim(job))] if given else []
    place = {"JOB_COMPLETION_INDEX": "0", "GPTLOOP_RANK_HOSTS": "127.0.0.1"}
    # So a launcher ends the others.
    assert work.start("rank", job, *attempt, log="pods.log", **place).wait() == 3
    record = work.record(job)
    assert (record.state, record.reason) == (JobState.FAILED, "The job has world_size 2, but 1 rank was started.")


def test_one_rank_trains_a_run_in_one_process(work: Workplace) -> None:
    job = work.enqueue(world_size="1")
    place = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "localhost"}
    assert work.start("rank", job, log="pods.log", **place).wait() == 0, work.log("pods.log")
    assert work.record(job).state is JobState.FINISHED


def test_mlx_launch_starts_ranks(work: Workplace) -> None:
    with work.worker(GPTLOOP_LAUNCHER=f"{MLX_LAUNCH} -n {{world_size}} --"):
        record = work.end(work.enqueue())
    assert record.state is JobState.FINISHED, record.reason


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="Open MPI is not installed")
def test_mpirun_starts_ranks_which_end_with_their_step(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.setitem(work.environment, name, "1")
    launcher = "mpirun --oversubscribe -n {world_size} --mca odls_base_sigkill_timeout 10"
    with work.worker(GPTLOOP_LAUNCHER=launcher) as worker:
        assert work.end(work.enqueue()).state is JobState.FINISHED
        job = work.enqueue(**ENDLESS | {"evaluation_interval": "1000000"})
        work.wait_for_steps(job, saved=False)
        worker.terminate()
        assert worker.wait() == 0
    assert work.reasons(job) == ["The worker was stopped; the job resumes when a worker is back."]
    record = work.record(job)
    assert record.spec and record.progress
    assert work.registry.states(record.spec.run) == [record.progress.step]


def test_ranks_of_their_own_take_a_job_that_waits(work: Workplace) -> None:
    job = work.enqueue()
    place = {"GPTLOOP_RANK_HOSTS": "localhost,localhost", "GPTLOOP_RANK_PORT": str(free_port_numbers(2)[0])}
    for _ in range(2):
        ranks = [
            work.start("rank", job, log="pods.log", JOB_COMPLETION_INDEX=str(rank), OMP_NUM_THREADS="1", **place)
            for rank in range(2)
        ]
        # The second time, the job has finished and nothing is left to do.
        assert [rank.wait() for rank in ranks] == [0, 0], work.log("pods.log")
    assert work.record(job).state is JobState.FINISHED


def test_all_ranks_end_at_the_step_at_which_a_run_waits_and_go_on_from_there(work: Workplace) -> None:
    job = work.enqueue_until(3)
    place = {"GPTLOOP_RANK_HOSTS": "localhost,localhost", "GPTLOOP_RANK_PORT": str(free_port_numbers(2)[0])}
    for code in (75, 0):
        ranks = [work.start("rank", job, log="pods.log", JOB_COMPLETION_INDEX=str(rank), **place) for rank in range(2)]
        assert [rank.wait() for rank in ranks] == [code, code], work.log("pods.log")
        if code:
            record = work.record(job)
            assert record.is_suspended
            work.queue.extend(record, 9)
    assert work.record(job).state is JobState.FINISHED and work.first_steps(job) == [1, 4]
    assert work.reasons(job) == ["Waits at step 3.", "Goes on to step 9."]


def test_ranks_of_their_own_that_are_stopped_ask_for_another_start(work: Workplace) -> None:
    job = work.enqueue(**ENDLESS)
    place = {"GPTLOOP_RANK_HOSTS": "127.0.0.1,127.0.0.1", "GPTLOOP_RANK_PORT": str(free_port_numbers(2)[0])}
    ranks = [work.start("rank", job, log="pods.log", JOB_COMPLETION_INDEX=str(rank), **place) for rank in range(2)]
    work.wait_for_steps(job, saved=False)
    # Any of them passes it on.
    ranks[1].terminate()
    assert [rank.wait() for rank in ranks] == [75, 75], work.log("pods.log")
    record = work.record(job)
    assert (record.state, record.attempt) == (JobState.QUEUED, 2)
    work.queue.cancel(job)


def test_a_lost_rank_of_its_own_returns_the_job(work: Workplace) -> None:
    job = work.enqueue(**ENDLESS)
    place = {"GPTLOOP_RANK_HOSTS": "127.0.0.1,127.0.0.1", "GPTLOOP_RANK_PORT": str(free_port_numbers(2)[0])}
    ranks = [work.start("rank", job, log="pods.log", JOB_COMPLETION_INDEX=str(rank), **place) for rank in range(2)]
    work.wait_for_steps(job)
    ranks[1].kill()
    assert [rank.wait() for rank in ranks] == [75, -signal.SIGKILL]
    assert work.reasons(job)[0].startswith("Rank 0 of 2 has lost the connection to another rank.")
    work.queue.cancel(job)
