"""How streams are read and left, against a server that follows a script."""

import asyncio
import gc
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from inference_service.client.client import AsyncInferenceClient, InferenceClient
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.inference_service.scripted_server import STARTED, STORY, Serve, hang, refuse, run_async, send
from tests.waiting import HANG_S, wait_until


def test_a_stream_tells_what_it_knows_so_far(serve: Serve) -> None:
    server = serve(send(*STORY))
    with InferenceClient(server.address) as client, client.generate("x") as stream:
        assert (stream.started, stream.finished) == (None, {})
        assert next(stream) == STARTED
        assert (stream.started, stream.finished) == (STARTED, {})
        assert list(stream) == list(STORY[1:])
        assert stream.finished == {0: STORY[-1]}
        assert list(stream) == []


def test_an_async_stream_tells_what_it_knows_so_far(serve: Serve) -> None:
    async def body(client: AsyncInferenceClient) -> None:
        async with client.generate("x") as stream:
            assert (stream.started, stream.finished) == (None, {})
            assert await anext(stream) == STARTED
            assert (stream.started, stream.finished) == (STARTED, {})
            assert [event async for event in stream] == list(STORY[1:])
            assert stream.finished == {0: STORY[-1]}
            assert [event async for event in stream] == []

    run_async(serve(send(*STORY)).address, body)


def test_the_text_comes_in_pieces_of_a_single_sample(serve: Serve) -> None:
    server = serve(send(*STORY))

    async def body(client: AsyncInferenceClient) -> None:
        assert [piece async for piece in client.generate("x").text()] == ["a ", "fox"]
        with pytest.raises(errors.InvalidArgument, match="2 samples"):
            client.generate("x", n=2).text()

    run_async(server.address, body)
    with InferenceClient(server.address) as client:
        assert list(client.generate("x").text()) == ["a ", "fox"]
        with pytest.raises(errors.InvalidArgument, match="2 samples"):
            client.generate("x", n=2).text()


@pytest.mark.parametrize(
    ("messages", "n"),
    [(STORY[:-1], 1), (STORY, 2), ((), 1), ((STARTED, pb.Finished(reason=pb.FINISH_REASON_CANCELLED)), 1)],
)
def test_a_stream_that_is_cut_short_says_so(serve: Serve, messages: tuple[Any, ...], n: int) -> None:
    server = serve(send(*messages))

    async def body(client: AsyncInferenceClient) -> None:
        with pytest.raises(errors.Unavailable, match="ended before the text did"):
            async for _ in client.generate("x", n=n):
                pass

    run_async(server.address, body)
    with InferenceClient(server.address) as client:
        stream = client.generate("x", n=n)
        with pytest.raises(errors.Unavailable, match="ended before the text did"):
            list(stream)
        assert list(stream) == []


def test_a_stream_that_failed_has_no_more_events(serve: Serve) -> None:
    server = serve(refuse(errors.NotFound("There is no version 9.")))
    with InferenceClient(server.address) as client:
        stream = client.generate("x")
        with pytest.raises(errors.NotFound):
            next(stream)
        assert list(stream) == []


@pytest.fixture
def no_collections() -> Iterator[None]:
    """What is dropped is freed at once or not at all."""
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
def test_leaving_an_async_loop_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(*STORY[:2]))

    async def body(client: AsyncInferenceClient) -> None:
        async for _ in client.generate("x"):
            break
        assert await asyncio.to_thread(server.left.wait, HANG_S)
        server.left.clear()
        async for _ in client.generate("x").text():
            break
        assert await asyncio.to_thread(server.left.wait, HANG_S)

    run_async(server.address, body)


@pytest.mark.usefixtures("no_collections")
def test_a_stream_that_is_dropped_before_its_first_event_is_cancelled(serve: Serve) -> None:
    server = serve(hang())
    with InferenceClient(server.address) as client:
        stream = client.generate("x")
        server.await_calls(1)
        del stream
        assert server.left.wait(HANG_S)
    server.left.clear()

    async def body(client: AsyncInferenceClient) -> None:
        stream = client.generate("x")
        await asyncio.to_thread(server.await_calls, 2)
        del stream
        assert await asyncio.to_thread(server.left.wait, HANG_S)

    run_async(server.address, body)


def test_an_error_in_a_with_block_cancels_the_call(serve: Serve) -> None:
    server = serve(hang(STARTED))
    with InferenceClient(server.address) as client:
        with pytest.raises(ZeroDivisionError), client.generate("x") as stream:
            for _ in stream:
                raise ZeroDivisionError
        assert server.left.wait(HANG_S)
        assert list(stream) == []
    server.left.clear()

    async def body(client: AsyncInferenceClient) -> None:
        with pytest.raises(ZeroDivisionError):
            async with client.generate("x") as stream:
                async for _ in stream:
                    raise ZeroDivisionError
        assert await asyncio.to_thread(server.left.wait, HANG_S)
        assert [event async for event in stream] == []

    run_async(server.address, body)


def test_cancel_ends_the_loop_of_another_thread(serve: Serve) -> None:
    server = serve(hang(STARTED))
    with InferenceClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate("x")
        reading = pool.submit(list, stream)
        wait_until(lambda: stream.started is not None)
        stream.cancel()
        assert reading.result(HANG_S) == [STARTED]
        assert server.left.wait(HANG_S)


def test_cancel_ends_the_loop_of_another_task(serve: Serve) -> None:
    server = serve(hang(STARTED))

    async def body(client: AsyncInferenceClient) -> None:
        stream = client.generate("x")
        began = asyncio.Event()

        async def read() -> list[Any]:
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

    run_async(server.address, body)


def test_a_cancelled_task_cancels_its_call(serve: Serve) -> None:
    server = serve(hang(STARTED), hang())

    async def body(client: AsyncInferenceClient) -> None:
        for number in (1, 2):
            task = asyncio.ensure_future(client.complete("x"))
            await asyncio.to_thread(server.await_calls, number)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.left.wait, HANG_S)
            server.left.clear()

    run_async(server.address, body)


def test_cancel_ends_the_wait_for_another_attempt(serve: Serve) -> None:
    pause_s = 60.0  # the longest that a client waits
    server = serve(refuse(errors.ResourceExhausted("Full.", retry_after_s=pause_s)))
    began_s = time.monotonic()
    with InferenceClient(server.address) as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate("x")
        reading = pool.submit(list, stream)
        server.await_calls(1)
        stream.cancel()
        assert reading.result(HANG_S) == []

    async def body(client: AsyncInferenceClient) -> None:
        stream = client.generate("x")
        reading = asyncio.ensure_future(anext(stream, None))
        await asyncio.to_thread(server.await_calls, 2)
        stream.cancel()
        assert await reading is None

    run_async(server.address, body)
    assert time.monotonic() - began_s < pause_s
    assert len(server.requests) == 2
