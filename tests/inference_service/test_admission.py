"""Limits on what waits for a slot, and when a rejected caller should retry."""

import pytest
from prometheus_client import Gauge

from inference_service.admission import Admission, Call, Ticket
from shared.errors import ResourceExhausted


class Waiting:
    """An admission with a clock that the test moves."""

    def __init__(self, requests: int, prompt_tokens: int = 1000) -> None:
        self.now = 0.0
        self.gauge = Gauge("waiting", "Samples that wait.", registry=None)
        self.admission = Admission(requests, prompt_tokens, self.gauge, lambda: self.now)

    def enter(self, samples: int = 1, call: Call | None = None) -> Ticket:
        return self.admission.enter(samples, call or Call()).__enter__()

    @property
    def count(self) -> float:
        (metric,) = self.gauge.collect()
        return metric.samples[0].value

    def retry_after_s(self) -> float:
        with pytest.raises(ResourceExhausted) as refused:
            self.enter()
        assert refused.value.retry_after_s is not None
        return refused.value.retry_after_s


def test_samples_count_until_they_get_slots_or_leave() -> None:
    waiting = Waiting(requests=5)
    first, second = waiting.enter(), waiting.enter(3)
    assert waiting.count == 4
    with pytest.raises(
        ResourceExhausted, match="4 requests are waiting already, and 2 more would exceed the limit of 5"
    ):
        waiting.enter(2)
    first.admitted()
    assert waiting.count == 3
    first.__exit__()
    assert waiting.count == 3
    second.__exit__()
    assert waiting.count == 0


def test_a_request_beyond_a_limit_is_accepted_if_nothing_else_waits() -> None:
    waiting = Waiting(requests=2, prompt_tokens=10)
    alone = waiting.enter(8)
    alone.add_prompt_tokens(100)
    with pytest.raises(ResourceExhausted):
        waiting.enter()
    alone.admitted()
    assert waiting.count == 0
    waiting.enter().add_prompt_tokens(10)


def test_a_call_is_not_refused_because_of_itself() -> None:
    waiting = Waiting(requests=2, prompt_tokens=10)
    call = Call()
    tickets = [waiting.enter(2, call) for _ in range(3)]
    for ticket in tickets:
        ticket.add_prompt_tokens(8)
    assert waiting.count == 6
    with pytest.raises(ResourceExhausted):
        waiting.enter()
    for ticket in tickets:
        ticket.admitted()
    other = waiting.enter()
    other.add_prompt_tokens(8)
    with pytest.raises(ResourceExhausted, match="1 requests are waiting already"):
        waiting.enter(2, call)
    with pytest.raises(ResourceExhausted, match="8 prompt tokens are waiting already"):
        waiting.enter(1, call).add_prompt_tokens(8)


def test_an_admitted_request_gives_its_prompt_tokens_back() -> None:
    waiting = Waiting(requests=10, prompt_tokens=10)
    first, second = waiting.enter(), waiting.enter()
    first.add_prompt_tokens(8)
    sentence = "8 prompt tokens are waiting already, and 3 more would exceed the limit of 10"
    with pytest.raises(ResourceExhausted, match=sentence):
        second.add_prompt_tokens(3)
    first.admitted()
    second.add_prompt_tokens(3)


def test_the_retry_time_is_the_time_for_half_of_the_queue() -> None:
    waiting = Waiting(requests=10)
    tickets = [waiting.enter() for _ in range(10)]
    assert waiting.retry_after_s() == 1.0
    for ticket in tickets[:4]:
        waiting.now += 2.0
        ticket.admitted()
        waiting.enter()
    assert waiting.retry_after_s() == pytest.approx(10 / 2 * 2.0)


def test_idle_time_does_not_count_as_slow_progress() -> None:
    waiting = Waiting(requests=10)
    for _ in range(5):
        waiting.enter().admitted()
    waiting.now += 3600.0
    tickets = [waiting.enter() for _ in range(10)]
    for ticket in tickets[:4]:
        waiting.now += 0.5
        ticket.admitted()
        waiting.enter()
    assert waiting.retry_after_s() < 3.0


def test_the_retry_time_is_bounded() -> None:
    waiting = Waiting(requests=10)
    for ticket in [waiting.enter() for _ in range(9)]:
        waiting.enter()
        waiting.now += 1e6
        ticket.admitted()
    waiting.enter()
    assert waiting.retry_after_s() == 60.0
