"""Retries and deadlines of both clients, on a server that follows a script."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from inference_service.client import InferenceClient
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service.listening import free_port_numbers
from tests.inference_service.scripted_server import STARTED, STORY, Serve, cancel, fail, hang, send
from tests.waiting import HANG_S

pytestmark = pytest.mark.slow

Use = Callable[..., Any]


# Retries.

CALLS = [("generate", "x"), ("complete", "x"), ("tokenize", "x"), ("detokenize", [1]), ("model",)]
ANSWERS = {
    "generate": STORY,
    "complete": STORY,
    "tokenize": (pb.TokenizeResponse(token_ids=[1, 2]),),
    "detokenize": (pb.DetokenizeResponse(text="fox"),),
    "model": (pb.GetModelResponse(version=7),),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_rejected_call_is_retried(serve: Serve, use: Use, call: tuple[str, ...]) -> None:
    full = errors.ResourceExhausted("The queue is full.", retry_after_s=0.01)
    unavailable = errors.Unavailable("No version serves yet.")
    server = serve(fail(unavailable), cancel(), fail(full), send(*ANSWERS[call[0]]))
    result = use(server.address, *call, retries=3)
    assert server.requests == [server.requests[0]] * 4
    match call[0]:
        case "generate":
            assert result == list(STORY)
        case "complete":
            assert result.text == "a fox"
        case "tokenize":
            assert result == [1, 2]
        case "detokenize":
            assert result == "fox"
        case "model":
            assert result.version == 7


def test_a_call_whose_client_is_closed_is_not_retried(serve: Serve) -> None:
    server = serve(hang())
    client = InferenceClient(server.address)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(client.complete, "x")
        server.await_calls(1)
        client.close()
        with pytest.raises(errors.GptloopError, match="CANCELLED: Channel closed!") as raised:
            reading.result(HANG_S)
    assert not isinstance(raised.value, errors.Unavailable)
    assert len(server.requests) == 1


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_the_number_of_retries_is_limited(serve: Serve, use: Use, call: tuple[str, ...]) -> None:
    full = errors.ResourceExhausted("The queue is full.", retry_after_s=0.01)
    server = serve(fail(full))
    for retries, calls in ((0, 1), (3, 5)):
        with pytest.raises(errors.ResourceExhausted, match="The queue is full") as raised:
            use(server.address, *call, retries=retries)
        assert raised.value.retry_after_s == 0.01
        assert len(server.requests) == calls


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgument("top_p is 2."),
        errors.NotFound("There is no version 9."),
        errors.FailedPrecondition("No."),
        errors.ResourceExhausted("The client reads too slowly."),
        errors.CorruptCheckpoint("Spoiled."),
        errors.GptloopError("The server failed."),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_other_errors_are_not_retried(
    serve: Serve, use: Use, call: tuple[str, ...], error: errors.GptloopError
) -> None:
    server = serve(fail(error))
    with pytest.raises(type(error), match=str(error)) as raised:
        use(server.address, *call)
    assert type(raised.value) is type(error)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "error",
    [errors.Unavailable("The server ends."), errors.ResourceExhausted("The queue is full.", retry_after_s=0.01)],
    ids=lambda error: type(error).__name__,
)
def test_a_call_is_not_retried_once_its_answer_has_begun(serve: Serve, use: Use, error: errors.GptloopError) -> None:
    server = serve(fail(error, STARTED))
    for method in ("generate", "complete"):
        with pytest.raises(type(error), match=str(error)):
            use(server.address, method, "x")
    assert len(server.requests) == 2


def test_a_retry_comes_after_the_pause_that_the_server_asks_for(serve: Serve, use: Use) -> None:
    # A longer pause than the client's own.
    server = serve(fail(errors.ResourceExhausted("Full.", retry_after_s=0.4)), send(*STORY))
    use(server.address, "generate", "x", timeout_s=9.0)
    first_s, second_s = server.arrived_s
    assert second_s - first_s > 0.39
    # The pause counts towards the timeout of the call.
    assert server.remaining_s[1] < server.remaining_s[0] - 0.3


def test_a_pause_beyond_the_deadline_is_not_waited_for(serve: Serve, use: Use) -> None:
    server = serve(fail(errors.ResourceExhausted("Full.", retry_after_s=30.0)))
    began_s = time.monotonic()
    with pytest.raises(errors.ResourceExhausted, match="Full"):
        use(server.address, "complete", "x", timeout_s=20.0)
    assert time.monotonic() - began_s < 20.0
    assert len(server.requests) == 1


def test_a_server_that_starts_later_is_found(serve: Serve, use: Use) -> None:
    (port,) = free_port_numbers(1)
    listener = socket.create_server(("127.0.0.1", port))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(use, f"127.0.0.1:{port}", "generate", "x", retries=6)
        with listener:
            # Ends the first attempt.
            listener.accept()[0].close()
        server = serve(send(*STORY), port=port)
        assert reading.result(HANG_S) == list(STORY)
    assert len(server.requests) == 1


def test_a_missing_server_is_reported_in_one_sentence(use: Use) -> None:
    (port,) = free_port_numbers(1)
    address = f"127.0.0.1:{port}"
    for call in CALLS:
        with pytest.raises(errors.Unavailable, match=f"No server answers at {address}"):
            use(address, *call, retries=0)


# Deadlines.


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0])
def test_a_call_beyond_its_deadline_raises_deadline_exceeded(serve: Serve, use: Use, call: tuple[str, ...]) -> None:
    server = serve(hang())
    with pytest.raises(errors.DeadlineExceeded, match=f"{server.address} did not end within 2 s"):
        # Long enough for the call to reach the server of a busy machine.
        use(server.address, *call, timeout_s=2.0)
    assert server.left.wait(HANG_S)
    assert len(server.requests) == 1


def test_the_error_is_the_same_if_the_server_notices_the_deadline_first(serve: Serve, use: Use) -> None:
    server = serve(send(*STORY[:2], pb.Finished(reason=pb.FINISH_REASON_DEADLINE)))
    for method in ("generate", "complete"):
        with pytest.raises(errors.DeadlineExceeded, match="did not end within 50 s"):
            use(server.address, method, "x", timeout_s=50.0)
    with InferenceClient(server.address) as client:
        stream = client.generate("x", timeout_s=50.0)
        assert [next(stream), next(stream)] == list(STORY[:2])
        assert stream.finished == {}
        next(stream)
        assert stream.finished[0].reason == pb.FINISH_REASON_DEADLINE
        with pytest.raises(errors.DeadlineExceeded):
            next(stream)
