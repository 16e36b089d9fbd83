"""How streams are read and left, on a server that follows a script."""

import asyncio
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from google.protobuf.message import Message

from inference_service.client import AsyncInferenceClient, InferenceClient
from inference_service.client.completion import Event
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.asynchronous import async_test
from tests.inference_service.scripted_server import STARTED, STORY, Serve, fail, hang, send
from tests.waiting import HANG_S, wait_until


def test_a_stream_keeps_the_events_that_it_has_read(serve: Serve) -> None:
    server = serve(send(*STORY))
    with InferenceClient(server.address) as client, client.generate("x") as stream:
        assert (stream.started, stream.finished) == (None, {})
        assert next(stream) == STARTED
        assert (stream.started, stream.finished) == (STARTED, {})
        assert list(stream) == list(STORY[1:])
        assert stream.finished == {0: STORY[-1]}
        assert list(stream) == []


@async_test
async def test_an_async_stream_keeps_the_events_that_it_has_read(serve: Serve) -> None:
    server = serve(send(*STORY))
    async with AsyncInferenceClient(server.address) as client, client.generate("x") as stream:
        assert (stream.started, stream.finished) == (None, {})
        assert await anext(stream) == STARTED
        assert (stream.started, stream.finished) == (STARTED, {})
        assert [event async for event in stream] == list(STORY[1:])
        assert stream.finished == {0: STORY[-1]}
        assert [event async for event in stream] == []


def test_text_yields_the_pieces_of_a_single_sample(serve: Serve) -> None:
    server = serve(send(*STORY))
    with InferenceClient(server.address) as client:
        assert list(client.generate("x").text()) == ["a ", "fox"]
        with pytest.raises(errors.InvalidArgument, match=r"^text\(\) needs a single sample, but n is 2"):
            client.generate("x", n=2).text()


@async_test
async def test_text_of_an_async_stream_yields_the_pieces_of_a_single_sample(serve: Serve) -> None:
    server = serve(send(*STORY))
    async with AsyncInferenceClient(server.address) as client:
        assert [piece async for piece in client.generate("x").text()] == ["a ", "fox"]
        with pytest.raises(errors.InvalidArgument, match=r"^text\(\) needs a single sample, but n is 2"):
            client.generate("x", n=2).text()


# The messages of streams that end too early, and the number of samples that the request asked for.
CUT_OFF: list[tuple[tuple[Message, ...], int]] = [
    (STORY[:-1], 1),
    (STORY, 2),
    ((), 1),
    ((STARTED, pb.Finished(reason=pb.FINISH_REASON_CANCELLED)), 1),
]


@pytest.mark.parametrize(("messages", "n"), CUT_OFF)
def test_a_stream_that_is_cut_off_raises_an_error(serve: Serve, messages: tuple[Message, ...], n: int) -> None:
    server = serve(send(*messages))
    with InferenceClient(server.address) as client:
        stream = client.generate("x", n=n)
        with pytest.raises(errors.Unavailable, match="was cut off before its last sample ended"):
            list(stream)
        assert list(stream) == []


@pytest.mark.parametrize(("messages", "n"), CUT_OFF)
@async_test
async def test_an_async_stream_that_is_cut_off_raises_an_error(
    serve: Serve, messages: tuple[Message, ...], n: int
) -> None:
    server = serve(send(*messages))
    async with AsyncInferenceClient(server.address) as client:
        with pytest.raises(errors.Unavailable, match="was cut off before its last sample ended"):
            async for _ in client.generate("x", n=n):
                pass


def test_a_failed_stream_has_no_more_events(serve: Serve) -> None:
    server = serve(fail(errors.NotFound("There is no version 9.")))
    with InferenceClient(server.address) as client:
        stream = client.generate("x")
        with pytest.raises(errors.NotFound):
            next(stream)
        assert list(stream) == []


@pytest.fixture
def no_collections() -> Iterator[None]:
    """Turns the cyclic collector off: an object is freed with its last reference, or not at all."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_leaving_a_loop_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(*STORY[:2]))
    with InferenceClient(server.address) as client:
        for _ in client.generate("x"):
            break
        assert server.left.wait(HANG_S)
        server.left.clear()
        for _ in client.generate("x").text():
            break
        assert server.left.wait(HANG_S)


@pytest.mark.usefixtures("no_collections")
@async_test
async def test_leaving_an_async_loop_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(*STORY[:2]))
    async with AsyncInferenceClient(server.address) as client:
        async for _ in client.generate("x"):
            break
        assert await asyncio.to_thread(server.left.wait, HANG_S)
        server.left.clear()
        async for _ in client.generate("x").text():
            break
        assert await asyncio.to_thread(server.left.wait, HANG_S)


@pytest.mark.usefixtures("no_collections")
def test_dropping_a_stream_before_its_first_event_cancels_the_call(serve: Serve) -> None:
    server = serve(hang())
    with InferenceClient(server.address) as client:
        stream = client.generate("x")
        server.await_calls(1)
        del stream
        assert server.left.wait(HANG_S)


@pytest.mark.usefixtures("no_collections")
@async_test
async def test_dropping_an_async_stream_before_its_first_event_cancels_the_call(serve: Serve) -> None:
    server = serve(hang())
    async with AsyncInferenceClient(server.address) as client:
        stream = client.generate("x")
        await asyncio.to_thread(server.await_calls, 1)
        del stream
        assert await asyncio.to_thread(server.left.wait, HANG_S)


def test_an_error_in_a_with_block_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(STARTED))
    with InferenceClient(server.address) as client:
        with pytest.raises(ZeroDivisionError), client.generate("x") as stream:
            for _ in stream:
                raise ZeroDivisionError
        assert server.left.wait(HANG_S)
        assert list(stream) == []


@async_test
async def test_an_error_in_an_async_with_block_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(STARTED))
    async with AsyncInferenceClient(server.address) as client:
        with pytest.raises(ZeroDivisionError):
            async with client.generate("x") as stream:
                async for _ in stream:
                    raise ZeroDivisionError
        assert await asyncio.to_thread(server.left.wait, HANG_S)
        assert [event async for event in stream] == []


def test_cancel_ends_the_loop_of_another_thread(serve: Serve) -> None:
    server = serve(hang(STARTED))
    with InferenceClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate("x")
        reading = pool.submit(list, stream)
        wait_until(lambda: stream.started is not None)
        stream.cancel()
        assert reading.result(HANG_S) == [STARTED]
        assert server.left.wait(HANG_S)


@async_test
async def test_cancel_ends_the_loop_of_another_task(serve: Serve) -> None:
    server = serve(hang(STARTED))
    async with AsyncInferenceClient(server.address) as client:
        stream = client.generate("x")
        began = asyncio.Event()

        async def read() -> list[Event]:
            events = []
            async for event in stream:
                events.append(event)
                began.set()
            return events

        reading = asyncio.create_task(read())
        await began.wait()
        stream.cancel()
        assert await reading == [STARTED]
        assert await asyncio.to_thread(server.left.wait, HANG_S)


@async_test
async def test_a_cancelled_task_cancels_its_call(serve: Serve) -> None:
    server = serve(hang(STARTED), hang())
    async with AsyncInferenceClient(server.address) as client:
        for number in (1, 2):
            task = asyncio.ensure_future(client.complete("x"))
            await asyncio.to_thread(server.await_calls, number)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.left.wait, HANG_S)
            server.left.clear()


# The longest pause for which a client waits.
PAUSE_S = 60.0


def test_cancel_ends_the_pause_before_a_retry(serve: Serve) -> None:
    server = serve(fail(errors.ResourceExhausted("Full.", retry_after_s=PAUSE_S)))
    began_s = time.monotonic()
    with InferenceClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate("x")
        reading = pool.submit(list, stream)
        server.await_calls(1)
        stream.cancel()
        assert reading.result(HANG_S) == []
    assert time.monotonic() - began_s < PAUSE_S
    assert len(server.requests) == 1


@async_test
async def test_cancel_ends_the_pause_before_a_retry_of_an_async_stream(serve: Serve) -> None:
    server = serve(fail(errors.ResourceExhausted("Full.", retry_after_s=PAUSE_S)))
    began_s = time.monotonic()
    async with AsyncInferenceClient(server.address) as client:
        stream = client.generate("x")
        reading = asyncio.ensure_future(anext(stream, None))
        await asyncio.to_thread(server.await_calls, 1)
        stream.cancel()
        assert await reading is None
    assert time.monotonic() - began_s < PAUSE_S
    assert len(server.requests) == 1
