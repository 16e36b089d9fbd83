"""How long a process ran, measured with a clock that the test moves."""

from hypothesis import given
from hypothesis import strategies as st

from inference_service.pauses import LOOK_INTERVAL_S, Pauses


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def test_a_process_that_looks_often_has_no_pause() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    for _ in range(100):
        clock.now_s += 0.5
        pauses.look()
    assert pauses.ran_since(50.0) == 50.0


def test_a_pause_counts_only_for_intervals_that_began_before_it() -> None:
    clock = Clock()
    pauses = Pauses(clock)
    clock.now_s += 11.0
    assert abs(pauses.ran_since(50.0) - LOOK_INTERVAL_S) < 1e-9
    clock.now_s += 0.5
    assert abs(pauses.ran_since(50.0) - LOOK_INTERVAL_S - 0.5) < 1e-9
    assert pauses.ran_since(61.0) == 0.5


@given(st.lists(st.floats(0.0, 1000.0), max_size=20), st.data())
def test_the_running_time_is_between_zero_and_the_elapsed_time(steps: list[float], data: st.DataObject) -> None:
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
