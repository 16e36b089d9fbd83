"""The limits on what waits, and when a caller is told to come back."""

import pytest
from prometheus_client import Gauge

from inference_service.admission import Admission, Place
from shared.errors import ResourceExhausted


class Waiting:
    """Admission with a clock that stands."""

    def __init__(self, requests: int, prompt_tokens: int = 1000) -> None:
        self.now = 0.0
        self.gauge = Gauge("waiting", "Samples that wait.", registry=None)
        self.admission = Admission(requests, prompt_tokens, self.gauge, lambda: self.now)

    def enter(self, samples: int = 1) -> Place:
        return self.admission.enter(samples).__enter__()

    @property
    def count(self) -> float:
        (metric,) = self.gauge.collect()
        return metric.samples[0].value

    def retry_after_s(self) -> float:
        with pytest.raises(ResourceExhausted) as refused:
            self.enter()
        assert refused.value.retry_after_s is not None
        return refused.value.retry_after_s


def test_samples_wait_until_they_have_their_slots_or_leave() -> None:
    waiting = Waiting(requests=5)
    first, second = waiting.enter(), waiting.enter(3)
    assert waiting.count == 4
    with pytest.raises(ResourceExhausted, match="4 requests wait already, and 2 more would pass the limit of 5"):
        waiting.enter(2)
    first.admitted()
    assert waiting.count == 3
    first.__exit__()
    assert waiting.count == 3
    second.__exit__()
    assert waiting.count == 0


def test_what_passes_a_limit_by_itself_has_its_turn_alone() -> None:
    waiting = Waiting(requests=2, prompt_tokens=10)
    alone = waiting.enter(8)
    alone.weigh(100)
    with pytest.raises(ResourceExhausted):
        waiting.enter()
    alone.admitted()
    assert waiting.count == 0
    waiting.enter().weigh(10)


def test_prompt_tokens_are_given_back_with_the_place() -> None:
    waiting = Waiting(requests=10, prompt_tokens=10)
    first, second = waiting.enter(), waiting.enter()
    first.weigh(8)
    with pytest.raises(ResourceExhausted, match="8 prompt tokens wait already, and 3 more would pass the limit of 10"):
        second.weigh(3)
    first.admitted()
    second.weigh(3)


def test_the_time_to_come_back_is_that_in_which_half_of_the_queue_moves_on() -> None:
    waiting = Waiting(requests=10)
    places = [waiting.enter() for _ in range(10)]
    assert waiting.retry_after_s() == 1.0
    for place in places[:4]:
        waiting.now += 2.0
        place.admitted()
        waiting.enter()
    assert waiting.retry_after_s() == pytest.approx(10 / 2 * 2.0)


def test_an_idle_hour_does_not_make_the_queue_look_slow() -> None:
    waiting = Waiting(requests=10)
    for _ in range(5):
        waiting.enter().admitted()
    waiting.now += 3600.0
    places = [waiting.enter() for _ in range(10)]
    for place in places[:4]:
        waiting.now += 0.5
        place.admitted()
        waiting.enter()
    assert waiting.retry_after_s() < 3.0


def test_the_time_to_come_back_is_bounded() -> None:
    waiting = Waiting(requests=10)
    for place in [waiting.enter() for _ in range(9)]:
        waiting.enter()
        waiting.now += 1e6
        place.admitted()
    waiting.enter()
    assert waiting.retry_after_s() == 60.0
