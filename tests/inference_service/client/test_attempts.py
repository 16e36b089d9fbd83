from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.client.attempts import Attempts
from shared import errors
from shared.service.grpc_status import code_of, details_of


class Failure(grpc.RpcError):
    """The failure of a call on which the server raised an error."""

    def __init__(self, error: errors.GptloopError) -> None:
        self.error = error

    def code(self) -> grpc.StatusCode:
        return code_of(self.error)

    def details(self) -> str:
        return str(self.error)

    def trailing_metadata(self) -> Any:
        return details_of(self.error)


FULL = Failure(errors.ResourceExhausted("The queue is full.", retry_after_s=2.0))
AWAY = Failure(errors.Unavailable("No version serves yet."))


def test_pauses_are_random_and_grow_to_a_limit() -> None:
    attempts = Attempts("host:1", 8, None)
    pauses = [attempts.pause_s(AWAY) for _ in range(8)]
    for pause_s, most_s in zip(pauses, [0.5, 1, 2, 4, 5, 5, 5, 5], strict=True):
        assert most_s / 2 <= pause_s <= most_s
    assert len({Attempts("host:1", 1, None).pause_s(AWAY) for _ in range(5)}) > 1


@given(st.integers(1, 60_000))
def test_a_pause_is_never_shorter_than_the_server_asked_for(asked_ms: int) -> None:
    asked_s = asked_ms / 1000
    pause_s = Attempts("host:1", 1, None).pause_s(Failure(errors.ResourceExhausted("Full.", retry_after_s=asked_s)))
    assert asked_s <= pause_s <= 1.2 * asked_s


@given(st.integers(0, 20))
def test_the_last_failure_is_raised(retries: int) -> None:
    attempts = Attempts("host:1", retries, None)
    for _ in range(retries):
        attempts.pause_s(AWAY)
    with pytest.raises(errors.Unavailable, match="No version serves yet"):
        attempts.pause_s(AWAY)


@pytest.mark.parametrize(
    ("retries", "timeout_s", "received", "failure"),
    [
        (0, None, False, FULL),
        (5, None, True, FULL),
        (5, 1.5, False, FULL),
        (5, None, False, Failure(errors.ResourceExhausted("Come tomorrow.", retry_after_s=86400.0))),
        (5, None, False, Failure(errors.ResourceExhausted("The client reads too slowly."))),
    ],
    ids=["no retries left", "answer has begun", "no time left", "wait too long", "no retry time"],
)
def test_a_call_is_not_retried(retries: int, timeout_s: float | None, received: bool, failure: Failure) -> None:
    with pytest.raises(errors.ResourceExhausted) as raised:
        Attempts("host:1", retries, timeout_s).pause_s(failure, received)
    assert isinstance(failure.error, errors.ResourceExhausted)
    assert (str(raised.value), raised.value.retry_after_s) == (str(failure.error), failure.error.retry_after_s)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_must_be_a_positive_number(timeout_s: float) -> None:
    with pytest.raises(errors.InvalidArgument, match=f"timeout_s is {timeout_s}, but must be a positive number"):
        Attempts("host:1", 1, timeout_s)
