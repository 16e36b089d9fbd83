from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from shared.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from shared.registry.registry import Registry
from tests.jobs import training
from tests.trainer_service.sweep.sweeps import Played
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue


@pytest.fixture
def played(queue: JobQueue, tmp_path: Path) -> Played:
    return Played(queue, tmp_path)


def test_a_sweep_stops_at_each_rung_what_has_not_the_lowest_losses(played: Played) -> None:
    sweep = played.sweep()
    assert sweep.begin() == 0
    assert [played.until(number) for number in (1, 2, 3, 4)] == [10] * 4
    for number, loss in ((4, 3.0), (2, 2.0), (1, 4.0)):
        played.train(number, loss)
        assert not sweep.turn().decision.is_due
    played.train(3, 1.0)
    assert not sweep.turn().is_over
    assert [played.job(number).state for number in (1, 4)] == [JobState.CANCELLED] * 2
    assert played.job(4).reason == "Others of the sweep try have a lower loss at step 10."
    assert [played.until(number) for number in (2, 3)] == [20] * 2
    assert [job for job, _ in played.queue.attempts.waiting()] == [played.job(2).id, played.job(3).id]
    played.train(2, 0.5)
    played.train(3, 0.6)
    sweep.turn()
    assert (played.until(2), played.job(3).state) == (40, JobState.CANCELLED)
    played.train(2, 0.4)
    turn = sweep.turn()
    assert turn.is_over and not turn.decision.is_due and played.job(2).state is JobState.FINISHED


def test_runs_that_were_stopped_no_longer_count_as_unfinished_and_those_that_wait_do(played: Played) -> None:
    sweep = played.sweep()
    sweep.begin()
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    assert played.registry.ended() == frozenset()
    assert played.registry.holds.runs().keys() == {f"try-{number}" for number in (1, 2, 3, 4)}
    sweep.turn()
    assert played.registry.ended() == {"try-3", "try-4"}
    assert played.registry.holds.runs().keys() == {"try-1", "try-2"}


def test_another_process_goes_on_where_one_was_killed(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills the command before the second job, the second extension and the second stop."""

    class Killed(BaseException):
        pass

    for name in ("enqueue", "extend", "stop"):
        original = getattr(JobQueue, name)
        calls = 0

        def act_once(*given: object, original: object = original, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise Killed
            return original(*given, **named)  # type: ignore[operator]

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(JobQueue, name, act_once)
            sweep = played.sweep()
            sweep.begin()
            for number in (1, 2, 3, 4):
                if not played.job(number).is_suspended and played.until(number) == 10:
                    played.train(number, float(number))
            sweep.turn()
        sweep = played.sweep()
        sweep.begin()
    sweep.turn()
    assert [played.until(number) for number in (1, 2, 3, 4)] == [20, 20, 10, 10]
    assert [played.job(number).state for number in (3, 4)] == [JobState.CANCELLED] * 2


def test_a_process_that_is_killed_before_it_marks_a_run_leaves_that_to_the_next(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    sweep = played.sweep()
    sweep.begin()
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Registry, "end_run", die)
        sweep.turn()
    assert [played.job(number).state for number in (3, 4)] == [JobState.CANCELLED] * 2
    sweep = played.sweep()
    sweep.begin()
    sweep.turn()
    assert played.registry.ended() == {"try-3", "try-4"}


def test_a_process_does_not_stop_what_another_has_just_sent_on(played: Played) -> None:
    first, second = played.sweep(), played.sweep()
    first.begin()
    second.begin()
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    seen = second.jobs()
    played.queue.cancel(played.job(1).id)
    first.turn()
    assert [played.until(number) for number in (2, 3)] == [20, 20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second, "jobs", iter([seen, first.jobs()]).__next__)
        second.turn()
    assert played.job(3).state is JobState.QUEUED
    assert played.registry.ended() == {"try-1", "try-4"}


def test_two_processes_that_decide_the_same_do_it_once(played: Played) -> None:
    first, second = played.sweep(), played.sweep()
    assert (first.begin(), second.begin()) == (0, 4)
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    seen = second.jobs()
    first.turn()
    second.jobs = lambda: seen  # type: ignore[method-assign]
    second.turn()
    assert [job for job, _ in played.queue.attempts.waiting()] == [played.job(1).id, played.job(2).id]
    assert [played.job(number).attempt for number in (1, 2)] == [2, 2]


def test_candidates_that_fail_or_are_cancelled_count_as_the_worst_and_end_no_sweep(played: Played) -> None:
    sweep = played.sweep()
    sweep.begin()
    played.end(1, JobState.FAILED, "The training loss is nan at step 4: training diverged.")
    played.queue.cancel(played.job(2).id)
    played.train(3, 9.0)
    played.train(4, 8.0)
    sweep.turn()
    assert [played.until(number) for number in (3, 4)] == [20, 20]
    played.end(4, JobState.FAILED)
    played.train(3, 8.5)
    sweep.turn()
    assert played.until(3) == 40
    played.end(3, JobState.FAILED)
    assert sweep.turn().is_over


def test_a_sweep_that_began_with_other_values_or_rungs_is_refused(played: Played) -> None:
    played.sweep().begin()
    with pytest.raises(
        InvalidArgument, match="has begun with seed 2 instead of 5 in candidate 2: give the command with"
    ):
        replace(played, tried="seed=1,5,3,4").sweep().begin()
    with pytest.raises(InvalidArgument, match=r"has begun with dropout 0\.0 instead of 0\.5 in candidate 1"):
        replace(played, overrides={"dropout": "0.5"}).sweep().begin()
    with pytest.raises(InvalidArgument, match="Candidate 1 trains to step 10, but this command has rungs at the steps"):
        replace(played, overrides={}, keep=Fraction(2, 3)).sweep().begin()


def test_a_sweep_gets_no_more_candidates_once_some_have_gone_on_and_never_fewer(played: Played) -> None:
    replace(played, tried="seed=1,2").sweep().begin()
    sweep = played.sweep()
    assert sweep.begin() == 2
    with pytest.raises(InvalidArgument, match="has begun with more than 3 candidates, but this command names 3"):
        replace(played, tried="seed=1,2,3").sweep().begin()
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    sweep.turn()
    with pytest.raises(
        InvalidArgument, match="has begun with 4 candidates, but this command names 5: give the command"
    ):
        replace(played, tried="seed=1,2,3,4,5").sweep().begin()


def test_a_name_of_other_runs_is_refused(played: Played, queue: JobQueue, tmp_path: Path) -> None:
    taken = queue.enqueue(training(tmp_path, name="try-2")).id
    with pytest.raises(
        AlreadyExists, match=f"The job {taken} has a run named 'try-2' already, which is not a candidate"
    ):
        played.sweep().begin()
    assert len(list(queue.store.jobs())) == 1


def test_a_sweep_whose_jobs_have_expired_is_refused(played: Played, queue: JobQueue) -> None:
    played.sweep().begin()
    for number in (1, 2, 3, 4):
        played.train(number, 1.0)
    queue.store.redis.delete(*(queue.store.keys.job(played.job(number).id) for number in (2, 3)))
    with pytest.raises(AlreadyExists, match="The registry has a run named 'try-2' already, and no job of it is left"):
        played.sweep().begin()


def test_a_job_that_vanishes_ends_the_command_with_a_sentence(played: Played, queue: JobQueue) -> None:
    sweep = played.sweep()
    sweep.begin()
    job = played.job(3).id
    queue.store.redis.delete(queue.store.keys.job(job))
    with pytest.raises(NotFound, match=f"The job {job} of the sweep try is gone from Redis"):
        sweep.turn()


def test_without_redis_a_sweep_waits_for_it(played: Played, queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = played.sweep()
    sweep.begin()

    def refuse(*_: object) -> None:
        raise Unavailable("Redis does not answer.")

    with monkeypatch.context() as patch:
        patch.setattr(type(queue.store), "read", refuse)
        with pytest.raises(Unavailable):
            sweep.turn()
    assert not sweep.turn().is_over
