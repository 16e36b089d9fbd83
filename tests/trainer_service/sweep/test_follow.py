import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import Unavailable
from tests.trainer_service.sweep.sweeps import Played
from trainer_service.jobs.events import JobState
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.sweep import follow as follow_module
from trainer_service.sweep.follow import follow
from trainer_service.sweep.sweep import Sweep


@pytest.fixture
def played(queue: JobQueue, tmp_path: Path) -> Played:
    return Played(queue, tmp_path)


@pytest.fixture
def sweep(played: Played) -> Sweep:
    sweep = played.sweep()
    sweep.begin()
    return sweep


def happening(monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> None:
    """Lets the next of these happen whenever the command waits; nothing else passes time."""
    left = iter(steps)
    monkeypatch.setattr("time.sleep", lambda _: next(left)())


def fail(played: Played, *numbers: int) -> None:
    for number in numbers:
        played.end(number, JobState.FAILED, "It broke.")


def shown(sweep: Sweep, queue: JobQueue, terminal: bool = False) -> Iterator[str]:
    output = io.StringIO()
    try:
        follow(sweep, queue, Console(file=output, width=120, force_terminal=terminal))
    finally:
        yield from output.getvalue().splitlines()


def test_every_rung_end_and_decision_is_one_line(
    played: Played, sweep: Sweep, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.store.workers.renew("worker", Offer())
    happening(
        monkeypatch,
        lambda: played.train(2, 2.0),
        lambda: played.end(1, JobState.FAILED, "It diverged."),
        lambda: queue.cancel(played.job(4).id),
        lambda: played.train(3, 3.0),
        lambda: played.train(3, 2.5),
        lambda: played.train(2, 1.5),
        lambda: played.train(2, 1.25),
    )
    assert list(shown(sweep, queue)) == [
        "candidate 2 (seed=2): held-out loss 2.0000 at step 10",
        "candidate 1 has failed: It diverged.",
        "candidate 4 was cancelled",
        "candidate 3 (seed=3): held-out loss 3.0000 at step 10",
        "going on to step 20: candidates 2 and 3",
        "candidate 3 (seed=3): held-out loss 2.5000 at step 20",
        "candidate 2 (seed=2): held-out loss 1.5000 at step 20",
        "going on to step 40: candidate 2; stopped: candidate 3",
        "candidate 2 (seed=2): held-out loss 1.2500 at step 40",
    ]


def test_on_a_terminal_a_bar_shows_how_much_is_done(
    played: Played, sweep: Sweep, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2, 3, 4):
        played.train(number, float(number))
    turn = sweep.turn()
    view = follow_module.View(sweep)
    # 40 of 4 * 10 + 2 * 10 + 20 steps.
    assert view.fraction(turn) == 0.5
    assert view.facts(turn) == ["4 of 4 candidates left", "best held-out 1.000"]
    queue.store.workers.renew("worker", Offer())
    happening(monkeypatch, lambda: fail(played, 1, 2))
    assert "50%  2 of 4 candidates left" in " ".join(shown(sweep, queue, terminal=True))


def test_a_sweep_without_a_live_worker_is_followed_only_for_a_limited_time(
    sweep: Sweep, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "PATIENCE_S", -1.0)
    with pytest.raises(Unavailable, match="No worker is alive, so the candidates wait"):
        list(shown(sweep, queue))


def test_following_goes_on_after_an_outage_of_redis(
    played: Played, sweep: Sweep, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.store.workers.renew("worker", Offer())
    turn, outages = sweep.turn, iter([True, True, False, False])

    def turn_or_fail() -> object:
        if next(outages):
            raise Unavailable("Redis does not answer.")
        return turn()

    monkeypatch.setattr(sweep, "turn", turn_or_fail)
    happening(
        monkeypatch,
        lambda: None,
        lambda: None,
        lambda: fail(played, 1, 2, 3, 4),
    )
    first, *others = shown(sweep, queue)
    assert first == "note: Redis does not answer. The sweep goes on when Redis answers."
    assert others == [f"candidate {number} has failed: It broke." for number in (1, 2, 3, 4)]


def test_following_waits_for_redis_only_for_a_limited_time(
    sweep: Sweep, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise Unavailable("Redis does not answer.")

    monkeypatch.setattr(sweep, "turn", refuse)
    monkeypatch.setattr(follow_module, "OUTAGE_S", -1.0)
    with pytest.raises(Unavailable):
        list(shown(sweep, queue))
