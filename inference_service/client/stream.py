"""A generation that is under way, as a client sees it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from inference_service.client.attempts import Attempts
from inference_service.client.completion import Event
from shared.errors import GptloopError, InvalidArgument, Unavailable
from shared.pb.inference.v1 import inference_pb2 as pb


class _BaseStream:
    """What both kinds of stream do alike: everything but to wait.

    `started` is None until that event was read; `finished` has the last event of each sample that has ended, by index.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        request: pb.GenerateRequest,
        attempts: Attempts,
        end: threading.Event | asyncio.Event,
    ) -> None:
        self.started: pb.Started | None = None
        self.finished: dict[int, pb.Finished] = {}
        self._generate = generate
        self._request = request
        self._attempts = attempts
        # Set when no more events will come: the stream was cancelled, failed or ended.
        self._end = end
        self._call: Any = None
        self._open()

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the call, and on the server its work; a loop over the stream ends without an error."""
        self._end.set()
        if self._call is not None:
            self._call.cancel()

    def _open(self) -> None:
        self._call = self._generate(self._request, timeout=self._attempts.remaining_s())
        # Another thread's `cancel` may have met the call before this one.
        if self._end.is_set():
            self._call.cancel()

    def _receive(self, response: pb.GenerateResponse) -> Event:
        event: Event = getattr(response, str(response.WhichOneof("event")))
        match event:
            case pb.Started():
                self.started = event
            case pb.Finished():
                self.finished[event.index] = event
        return event

    def _pause_s(self, failure: grpc.RpcError) -> float:
        """How long to wait before the call is made again; raises what the failure means where it must not be."""
        try:
            return self._attempts.pause_s(failure, received=self.started is not None)
        except GptloopError:
            self._end.set()
            raise

    def _finish(self) -> None:
        """Notes the end; raises `DeadlineExceeded` where the server was the first to notice that the time was up, and
        `Unavailable` where something between cut the stream short."""
        ended_here = self._end.is_set()
        self._end.set()
        cut = any(finished.reason == pb.FINISH_REASON_CANCELLED for finished in self.finished.values())
        if not ended_here and (cut or len(self.finished) < max(self._request.n, 1)):
            raise Unavailable("The stream ended before the text did; ask again.")
        if any(finished.reason == pb.FINISH_REASON_DEADLINE for finished in self.finished.values()):
            raise self._attempts.overdue() from None

    def _check_single(self) -> None:
        if self._request.n > 1:
            raise InvalidArgument(
                f"The text of {self._request.n} samples is no single one: read the events, which have an index."
            )


class Stream(_BaseStream):
    """A generation that is under way: an iterator over its events, `Started`, any number of `Delta`, then `Finished`.

    The call began when the stream was made. It is cancelled where a `with` block over the stream is left, by `cancel`
    from any thread, and when nothing refers to the stream any more. Otherwise one thread reads it.

    Reading raises the error that the server raised, `Unavailable` where there is no server, and `DeadlineExceeded`
    where the call took longer than it was given.
    """

    _end: threading.Event

    def __init__(self, generate: Callable[..., Any], request: pb.GenerateRequest, attempts: Attempts) -> None:
        super().__init__(generate, request, attempts, threading.Event())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while not self._end.is_set():
            try:
                return self._receive(next(self._call))
            except StopIteration:
                self._finish()
            except grpc.RpcError as failure:
                if not self._end.is_set() and not self._end.wait(self._pause_s(failure)):
                    self._open()
        raise StopIteration

    def text(self) -> Iterator[str]:
        """The pieces of the text, none of them empty; raises `InvalidArgument` on a stream of several samples."""
        self._check_single()
        return (event.text for event in self if isinstance(event, pb.Delta) and event.text)


class AsyncStream(_BaseStream):
    """`Stream` for asyncio: the same, with `async for` and `async with`. It belongs to the event loop of its client."""

    _end: asyncio.Event

    def __init__(self, generate: Callable[..., Any], request: pb.GenerateRequest, attempts: Attempts) -> None:
        super().__init__(generate, request, attempts, asyncio.Event())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._end.is_set():
            try:
                return self._receive(await anext(aiter(self._call)))
            except StopAsyncIteration:
                self._finish()
            except grpc.RpcError as failure:
                if not self._end.is_set() and not await self._ends_within(self._pause_s(failure)):
                    self._open()
            except asyncio.CancelledError:
                # Reading a call that was cancelled looks as if the reader were.
                reader = asyncio.current_task()
                if not self._end.is_set() or (reader is not None and reader.cancelling()):
                    raise
        raise StopAsyncIteration

    def text(self) -> AsyncIterator[str]:
        """The pieces of the text, none of them empty; raises `InvalidArgument` on a stream of several samples."""
        self._check_single()
        return (event.text async for event in self if isinstance(event, pb.Delta) and event.text)

    async def _ends_within(self, pause_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), pause_s)
        return self._end.is_set()
