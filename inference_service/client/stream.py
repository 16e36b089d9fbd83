"""A running generation, as a client sees it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, ClassVar, Self

import grpc

from inference_service.client.attempts import Attempts
from inference_service.client.completion import Event
from shared.errors import GptloopError, InvalidArgument, Unavailable
from shared.pb.inference.v1 import inference_pb2 as pb


class _BaseStream:
    """What both kinds of stream share: everything except waiting.

    `started` is None until that event has been read. `finished` holds the last event of each ended sample, by index.
    """

    _Event: ClassVar[type[threading.Event | asyncio.Event]]

    def __init__(self, generate: Callable[..., Any], request: pb.GenerateRequest, attempts: Attempts) -> None:
        self.started: pb.Started | None = None
        self.finished: dict[int, pb.Finished] = {}
        self._generate = generate
        self._request = request
        self._attempts = attempts
        # Set when no more events will come: the stream was cancelled, has failed or has ended.
        self._end = self._Event()
        self._call: Any = None
        self._open()

    def __del__(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancels the call and its work on the server; a loop over the stream ends without an error."""
        self._end.set()
        if self._call is not None:
            self._call.cancel()

    def _open(self) -> None:
        self._call = self._generate(self._request, timeout=self._attempts.remaining_s())
        # Another thread may have cancelled the previous call in the meantime.
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
        """Returns the pause before a retry; raises the error of the failure if there is none."""
        try:
            return self._attempts.pause_s(failure, received=self.started is not None)
        except GptloopError:
            self._end.set()
            raise

    def _finish(self) -> None:
        """Marks the stream as ended.

        Raises `DeadlineExceeded` if the server noticed the deadline first, and `Unavailable` if the stream was cut off.
        """
        ended_here = self._end.is_set()
        self._end.set()
        cut = any(finished.reason == pb.FINISH_REASON_CANCELLED for finished in self.finished.values())
        if not ended_here and (cut or len(self.finished) < max(self._request.n, 1)):
            raise Unavailable("The stream was cut off before its last sample ended; retry the call.")
        if any(finished.reason == pb.FINISH_REASON_DEADLINE for finished in self.finished.values()):
            raise self._attempts.overdue() from None

    def _check_single(self) -> None:
        if self._request.n > 1:
            raise InvalidArgument(
                f"text() needs a single sample, but n is {self._request.n}; iterate over the events instead."
            )


class Stream(_BaseStream):
    """A running generation: an iterator over its events, `Started`, any number of `Delta`, then `Finished`.

    The call starts when the stream is created. It is cancelled when its `with` block is left, when any thread calls
    `cancel`, and when the stream is garbage-collected. Only one thread may read the stream.

    Reading raises the error that the server raised, `Unavailable` if no server answers, and `DeadlineExceeded` if the
    call exceeds its deadline.
    """

    _Event = threading.Event
    _end: threading.Event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
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
        """Iterates over the non-empty chunks of the text; raises `InvalidArgument` if there are several samples."""
        self._check_single()
        return (event.text for event in self if isinstance(event, pb.Delta) and event.text)


class AsyncStream(_BaseStream):
    """`Stream` for asyncio, with `async for` and `async with`. It belongs to the event loop of its client."""

    _Event = asyncio.Event
    _end: asyncio.Event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
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
                # Reading a cancelled call raises the same error as cancelling the reader.
                reader = asyncio.current_task()
                if not self._end.is_set() or (reader is not None and reader.cancelling()):
                    raise
        raise StopAsyncIteration

    def text(self) -> AsyncIterator[str]:
        """Iterates over the non-empty chunks of the text; raises `InvalidArgument` if there are several samples."""
        self._check_single()
        return (event.text async for event in self if isinstance(event, pb.Delta) and event.text)

    async def _ends_within(self, pause_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), pause_s)
        return self._end.is_set()
