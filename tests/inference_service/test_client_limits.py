import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from inference_service.client_limits import ClientLimits, TokenBucket
from inference_service.metrics import InferenceMetrics
from shared.device.accelerator import Memory
from shared.errors import ResourceExhausted
from shared.service.access.tokens import Caller

ALICE, BOB = Caller("alice", is_operator=False), Caller("bob", is_operator=False)
OLGA = Caller("olga", is_operator=True)
MINUTE_S = 60.0


class Limited:
    """Limits with a clock that a test moves, and what the metrics page says."""

    def __init__(self, streams: int = 0, tokens_per_minute: int = 0, slots: int = 8) -> None:
        self.now = 1000.0
        self.registry = CollectorRegistry()
        metrics = InferenceMetrics(self.registry, lambda: Memory(0, 0, 0, 0), lambda: 0, lambda: 0, {})
        self.limits = ClientLimits(slots, streams, tokens_per_minute, metrics, lambda: self.now)

    def use(self, caller: Caller, tokens: int) -> None:
        with self.limits.enter(caller, 1) as call:
            call.charge(tokens)

    def wait_s(self, caller: Caller, samples: int = 1) -> float:
        """Returns the time after which a client may call again, 0 if it may now."""
        try:
            with self.limits.enter(caller, samples):
                return 0.0
        except ResourceExhausted as error:
            assert error.retry_after_s is not None
            assert f"retry in {error.retry_after_s:.1f} s." in str(error)
            return error.retry_after_s

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"gptloop_inference_client_{name}", labels)


CALLS = st.lists(st.tuples(st.floats(0, 100), st.integers(0, 500)), max_size=40)


@given(st.integers(1, 1000), CALLS)
def test_no_more_is_used_in_any_time_than_comes_back_in_it_and_the_last_call(
    per_minute: int, calls: list[tuple[float, int]]
) -> None:
    bucket, now = TokenBucket(per_minute, 0.0), 0.0
    used: list[tuple[float, int]] = []
    for after_s, tokens in calls:
        now += after_s
        if not bucket.wait_s(now):
            bucket.take(tokens, now)
            used.append((now, tokens))
    for first, last in itertools.combinations_with_replacement(range(len(used)), 2):
        passed_s = used[last][0] - used[first][0]
        before_last = sum(tokens for _, tokens in used[first:last])
        assert before_last < per_minute + passed_s * per_minute / MINUTE_S + 1e-6


@given(st.integers(1, 1000), CALLS)
def test_who_waits_as_long_as_asked_may_call_and_not_before(per_minute: int, calls: list[tuple[float, int]]) -> None:
    bucket, now = TokenBucket(per_minute, 0.0), 0.0
    for after_s, tokens in calls:
        now += after_s
        if wait_s := bucket.wait_s(now):
            # A whole token comes back in 60 s / per_minute; before that, nothing is there.
            early_s = wait_s - MINUTE_S / per_minute
            if early_s > 1e-3:
                assert bucket.wait_s(now + early_s - 1e-3) > 0
            now += wait_s
            assert bucket.wait_s(now + 1e-6) == 0
        bucket.take(tokens, now)


@given(st.integers(1, 1000), st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 500)), max_size=40))
def test_a_clock_that_goes_back_gives_nothing(per_minute: int, calls: list[tuple[float, int]]) -> None:
    one, other, now, latest = TokenBucket(per_minute, 0.0), TokenBucket(per_minute, 0.0), 0.0, 0.0
    for moved_s, tokens in calls:
        now += moved_s
        latest = max(latest, now)
        one.take(tokens, now)
        other.take(tokens, latest)
        assert one.wait_s(latest) == other.wait_s(latest)


def test_what_is_saved_is_at_most_a_minute() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(60, 1000.0)
    assert bucket.wait_s(1000.0) == 1.0


def test_a_call_that_uses_up_the_tokens_goes_on_and_the_next_waits() -> None:
    limited = Limited(tokens_per_minute=60)
    with limited.limits.enter(ALICE, 1) as call:
        for _ in range(10):
            call.charge(12)
        assert limited.wait_s(ALICE) == 61.0
        assert limited.wait_s(BOB) == 0
    limited.now += 60
    assert limited.wait_s(ALICE) == 1.0
    limited.now += 1
    assert limited.wait_s(ALICE) == 0
    assert limited.metric("refusals_total", client="alice", limit="tokens") == 2
    assert limited.metric("refusals_total", client="bob", limit="tokens") is None
    assert limited.metric("tokens_total", client="alice") == 120


def test_a_refusal_names_the_limit() -> None:
    limited = Limited(streams=2, tokens_per_minute=50)
    with limited.limits.enter(ALICE, 1), pytest.raises(ResourceExhausted) as refused, limited.limits.enter(ALICE, 2):
        pass
    assert str(refused.value) == (
        "alice has 1 samples already, and 2 more would exceed its limit of 2 at once; retry in 1.0 s."
    )
    limited.use(ALICE, 50)
    with pytest.raises(ResourceExhausted) as refused, limited.limits.enter(ALICE, 1):
        pass
    assert str(refused.value) == "alice has used its 50 tokens a minute; retry in 1.2 s."


def test_the_time_to_wait_is_enough_as_a_status_carries_it() -> None:
    limited = Limited(tokens_per_minute=7)
    limited.use(ALICE, 9)
    wait_s = limited.wait_s(ALICE)
    assert wait_s == round(wait_s, 3) == math.ceil(3 / 7 * MINUTE_S * 1000) / 1000
    limited.now += round(wait_s * 1000) / 1000
    assert limited.wait_s(ALICE) == 0


def test_the_samples_of_all_calls_of_a_client_count_until_they_end() -> None:
    limited = Limited(streams=4)
    with limited.limits.enter(ALICE, 3):
        assert (limited.wait_s(ALICE, 1), limited.wait_s(ALICE, 2), limited.wait_s(BOB, 4)) == (0, 1.0, 0)
        with pytest.raises(ZeroDivisionError), limited.limits.enter(ALICE, 1):
            assert limited.wait_s(ALICE, 1) == 1.0
            raise ZeroDivisionError
        assert limited.wait_s(ALICE, 1) == 0
    assert limited.wait_s(ALICE, 4) == 0
    assert limited.metric("refusals_total", client="alice", limit="streams") == 2


def test_a_call_may_have_the_samples_of_its_client() -> None:
    assert Limited(streams=4).limits.most_samples(ALICE) == 4
    assert Limited(streams=40).limits.most_samples(ALICE) == 8
    for caller in (None, OLGA):
        assert Limited(streams=4).limits.most_samples(caller) == 8


@pytest.mark.parametrize("caller", [None, OLGA])
def test_operators_and_callers_without_a_name_have_no_limits(caller: Caller | None) -> None:
    limited = Limited(streams=1, tokens_per_minute=1)
    with limited.limits.enter(caller, 8) as call, limited.limits.enter(caller, 8):
        call.charge(1000)
    with limited.limits.enter(caller, 8):
        pass
    assert limited.metric("tokens_total", client="olga") is None


def test_without_limits_a_client_is_counted_only() -> None:
    limited = Limited()
    for _ in range(100):
        limited.use(ALICE, 1000)
    assert limited.metric("tokens_total", client="alice") == 100_000
