"""How long a process ran, by a clock that tests move."""

from hypothesis import given
from hypothesis import strategies as st

from inference_service.pauses import LOOK_INTERVAL_S, Pauses


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_a_process_that_looks_often_ran_all_the_time() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    for _ in range(100):
        clock.now_s += 0.5
        pauses.look()
    assert pauses.ran_since(50.0) == 50.0


def test_a_pause_counts_for_what_began_before_it_only() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    clock.now_s += 11.0
    assert abs(pauses.ran_since(50.0) - LOOK_INTERVAL_S) < 1e-9
    clock.now_s += 0.5
    assert abs(pauses.ran_since(50.0) - LOOK_INTERVAL_S - 0.5) < 1e-9
    assert pauses.ran_since(61.0) == 0.5


@given(st.lists(st.floats(0.0, 1000.0), max_size=20), st.data())
def test_no_time_is_negative_or_longer_than_the_clock_says(steps: list[float], data: st.DataObject) -> None:
    clock = Clock()
    pauses = Pauses(clock)
    moments = [clock.now_s]
    for step_s in steps:
        clock.now_s += step_s
        if data.draw(st.booleans()):
            pauses.look()
        moments.append(clock.now_s)
    for moment in moments:
        assert 0.0 <= pauses.ran_since(moment) <= clock.now_s - moment
