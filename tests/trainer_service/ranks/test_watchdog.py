"""The watchdog of a rank, with a clock that the tests set; test_ranks.py has one in a real process."""

from collections.abc import Iterator

import pytest

from trainer_service.ranks.watchdog import EXIT_CODE, FIRST_S, LEAST_S, Watchdog


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ended() -> list[int]:
    return []


@pytest.fixture
def watchdog(clock: Clock, ended: list[int]) -> Iterator[Watchdog]:
    with Watchdog(ended.append, clock) as running:
        yield running


def test_a_rank_without_another_step_ends(
    watchdog: Watchdog, clock: Clock, ended: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    watchdog.beat()
    watchdog.beat()
    clock.now_s += LEAST_S
    watchdog.look()
    assert not ended
    clock.now_s += 1
    watchdog.look()
    assert ended[0] == EXIT_CODE
    assert capsys.readouterr().out.startswith("No step ended within 60 s: another rank is stuck")


def test_long_steps_may_take_longer(watchdog: Watchdog, clock: Clock, ended: list[int]) -> None:
    for _ in range(5):
        watchdog.beat()
        clock.now_s += 10
    clock.now_s += 180
    watchdog.look()
    assert not ended
    clock.now_s += 20
    watchdog.look()
    assert ended


def test_the_first_of_very_long_steps_may_end(watchdog: Watchdog, clock: Clock, ended: list[int]) -> None:
    watchdog.beat()
    clock.now_s += FIRST_S
    watchdog.look()
    assert not ended
    clock.now_s += 1
    watchdog.look()
    assert ended


def test_nothing_is_expected_before_the_first_step(watchdog: Watchdog, clock: Clock, ended: list[int]) -> None:
    clock.now_s += 1e4
    watchdog.look()
    assert not ended


def test_nothing_is_expected_while_rank_0_evaluates(watchdog: Watchdog, clock: Clock, ended: list[int]) -> None:
    watchdog.beat()
    watchdog.beat()
    with watchdog.pause():
        watchdog.beat()
        clock.now_s += 1e4
        watchdog.look()
    clock.now_s += LEAST_S
    watchdog.look()
    assert not ended
    clock.now_s += 1
    watchdog.look()
    assert ended


def test_time_in_which_the_process_was_frozen_does_not_count(
    watchdog: Watchdog, clock: Clock, ended: list[int]
) -> None:
    watchdog.beat()
    clock.now_s += 1e4
    watchdog.look(late_s=1e4)
    assert not ended
