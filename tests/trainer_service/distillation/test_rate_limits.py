import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.distillation.answers import Kind
from trainer_service.distillation.rate_limits import Backoff, Limit, RateLimits, read_duration, read_limit

REACHED = "Rate limit reached for model `openai/gpt-oss-20b` in organization `org_01` service tier `on_demand` on"


def headers(limit: int, remaining: int, reset: str, name: str = "tokens") -> dict[str, str]:
    values = {"limit": str(limit), "remaining": str(remaining), "reset": reset}
    return {f"x-ratelimit-{part}-{name}": value for part, value in values.items()}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2m59.56s", 179.56),
        ("7.66s", 7.66),
        ("644ms", 0.644),
        ("1h2m3s", 3723.0),
        ("1d", 86400.0),
        ("1.984999999s", 1.984999999),
        ("30", 30.0),
        ("0", 0.0),
        ("", None),
        ("soon", None),
        ("1m and 2s", None),
        ("-3s", None),
        ("nan", None),
    ],
)
def test_durations_of_the_service_are_read(text: str, seconds: float | None) -> None:
    assert read_duration(text) == (None if seconds is None else pytest.approx(seconds))


@given(st.text(max_size=40))
def test_any_other_text_is_no_duration(text: str) -> None:
    seconds = read_duration(text)
    assert seconds is None or seconds >= 0


@pytest.mark.parametrize(
    ("message", "retry_after", "limit"),
    [
        (
            f"{REACHED} tokens per minute (TPM): Limit 12000, Used 4437, Requested 9854. Please try again in 11.455s. "
            "Need more tokens?",
            "12",
            Limit(Kind.RATE_LIMITED, "The limit of tokens per minute at Groq is reached for a moment.", 11.455),
        ),
        (
            f"{REACHED} requests per minute (RPM): Limit 30, Used 30, Requested 1. Please try again in 2s.",
            "",
            Limit(Kind.RATE_LIMITED, "The limit of requests per minute at Groq is reached for a moment.", 2.0),
        ),
        (
            f"{REACHED} tokens per day (TPD): Limit 100000, Used 97050, Requested 3619. Please try again in 9m38.016s.",
            "579",
            Limit(Kind.DAILY_LIMIT, "The limit of tokens per day at Groq is reached.", 578.016),
        ),
        (
            f"{REACHED} requests per day (RPD): Limit 1000, Used 1000, Requested 1. Please try again in 1m26.4s.",
            "",
            Limit(Kind.DAILY_LIMIT, "The limit of requests per day at Groq is reached.", 86.4),
        ),
        (
            f"{REACHED} tokens per minute (TPM): Limit 7000, Used 0, Requested ~12903. Please try again in 50s.",
            "",
            Limit(
                Kind.TOO_LARGE,
                "A call needs 12,903 tokens, but the limit of the account at Groq is 7,000 tokens per minute: raise "
                "it, or name another model in GPTLOOP_GROQ_MODEL.",
                0.0,
            ),
        ),
        ("Slow down.", "7", Limit(Kind.RATE_LIMITED, "The limit of calls at Groq is reached for a moment.", 7.0)),
        ("Slow down.", "", Limit(Kind.RATE_LIMITED, "The limit of calls at Groq is reached for a moment.", 10.0)),
        ("Slow down.", "4000", Limit(Kind.DAILY_LIMIT, "The limit of calls at Groq is reached.", 4000.0)),
        (
            f"{REACHED} tokens per day (TPD): Limit 100000, Used 97050, Requested 3619.",
            "",
            Limit(Kind.DAILY_LIMIT, "The limit of tokens per day at Groq is reached.", 3600.0),
        ),
    ],
)
def test_the_message_of_a_limit_says_how_to_go_on(message: str, retry_after: str, limit: Limit) -> None:
    found = read_limit(message, retry_after)
    assert (found.kind, found.sentence) == (limit.kind, limit.sentence)
    assert found.wait_s == pytest.approx(limit.wait_s)


@given(st.text(max_size=200), st.text(max_size=20))
def test_any_message_has_a_kind_and_a_wait(message: str, retry_after: str) -> None:
    assert read_limit(message, retry_after).wait_s > 0


def test_nothing_waits_before_the_service_has_reported_limits() -> None:
    assert RateLimits().wait_s(10**9, 0.0) == 0


def test_a_call_waits_until_its_tokens_are_left() -> None:
    limits = RateLimits()
    limits.end(limits.begin(1500), headers(8000, 2000, "45s"), 100.0)
    assert limits.wait_s(2000, 100.0) == 0
    # 6,000 tokens come back in 45 s.
    assert limits.wait_s(2400, 100.0) == pytest.approx(3.0)
    assert limits.wait_s(2400, 102.0) == pytest.approx(1.0)
    assert limits.wait_s(2400, 104.0) == 0
    # What is more than the limit waits until everything is left; the service decides then.
    assert limits.wait_s(9000, 100.0) == pytest.approx(45.0)


def test_calls_without_an_answer_count_against_the_limit() -> None:
    limits = RateLimits()
    limits.end(limits.begin(1500), headers(8000, 2000, "45s"), 100.0)
    first, second = limits.begin(1000), limits.begin(1000)
    assert limits.wait_s(400, 100.0) == pytest.approx(3.0)
    # Answers arrive in another order: the later call knew of the earlier one.
    limits.end(second, headers(8000, 6000, "15s"), 101.0)
    limits.end(first, headers(8000, 7000, "7.5s"), 101.0)
    assert limits.wait_s(6000, 101.0) == 0 and limits.wait_s(6400, 101.0) == pytest.approx(3.0)


def test_requests_of_the_day_wait_too() -> None:
    limits = RateLimits()
    limits.end(limits.begin(1), headers(1000, 1, "24h", "requests"), 0.0)
    assert limits.wait_s(1, 0.0) == 0
    limits.begin(1)
    assert limits.wait_s(1, 0.0) == pytest.approx(86400 / 999)


def test_headers_that_cannot_be_read_change_nothing() -> None:
    limits = RateLimits()
    for odd in ({}, headers(0, 0, "1s"), headers(8000, 0, "soon"), {"x-ratelimit-limit-tokens": "many"}):
        limits.end(limits.begin(1), odd, 0.0)
    assert limits.wait_s(8000, 0.0) == 0


def test_a_refusal_blocks_every_call_for_its_wait() -> None:
    limits = RateLimits()
    limits.block(5.0, 100.0)
    limits.block(1.0, 101.0)
    assert [limits.wait_s(1, now_s) for now_s in (100.0, 104.0, 105.0)] == [5.0, 1.0, 0.0]


def test_pauses_grow_until_the_work_gives_up() -> None:
    backoff, now_s, pauses = Backoff(), 100.0, []
    while not backoff.failed(now_s, now_s):
        pauses.append(backoff.wait_s(now_s))
        now_s += pauses[-1]
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0]
    backoff.succeeded()
    assert backoff.wait_s(now_s) == 0 and not backoff.failed(now_s, now_s) and backoff.wait_s(now_s) == 1.0


def test_calls_that_meet_one_outage_count_once() -> None:
    backoff = Backoff()
    assert not any(backoff.failed(99.0, 100.0) for _ in range(20))
    assert backoff.wait_s(100.0) == 1.0
