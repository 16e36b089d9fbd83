"""Handles every call of a server: parses requests, turns errors into statuses, and ends calls when the server stops."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from grpc_health.v1 import health_pb2

from shared.errors import GptloopError, InvalidArgument, Unavailable
from shared.service import traces
from shared.service.access_log import logged_call
from shared.service.grpc_status import code_of, details_of
from shared.service.log_ids import REQUEST_ID, with_ids

logger = logging.getLogger(__name__)

# The status message of calls that a server rejects because it stops.
ENDING = "The server is shutting down; try again in a moment."
# A status is sent in headers, and clients reject headers of more than a few kilobytes.
MAX_SENTENCE_BYTES = 1000
# More methods than all services have.
_MAX_METHODS = 128
# The server stops once no call has arrived for this time, or after this many checks.
_QUIET_S = 0.05
_CHECKS = 20
# Clients send the time that a call may take in three digits, rounded up, so the server's deadline is up to 1 % later.
_ROUNDING = 0.02
# Health answers until the end, so that clients learn that the server no longer serves.
_HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"

# Called when a call of the services has ended: with the name of its method, its status code, and the return value of a
# method that streams its responses.
Ended = Callable[[str, grpc.StatusCode, str | None], None]


@dataclass(eq=False)
class _Call:
    """A call whose method runs. `waits` is true while it waits for the next request of a stream."""

    task: asyncio.Task[Any]
    began_s: float
    waits: bool = False
    is_cut: bool = False
    reason: str | None = None


class Calls(grpc.aio.ServerInterceptor):
    """The calls of a server. Belongs to the event loop; must be the first interceptor.

    Parses requests: a malformed request, or one to `services` (full names) with an unknown field, ends with
    `InvalidArgument`. If a method raises, its call ends with the code and the message of the error.
    """

    def __init__(self, services: Collection[str], ended: Ended) -> None:
        self._services = services
        self._ended = ended
        self._refuses = False
        # How many calls are held, or None if calls are not held yet.
        self._held: int | None = None
        # Calls whose method runs, tasks of calls whose status is not sent yet, and tasks whose request has not arrived.
        self._running: set[_Call] = set()
        self._open: set[asyncio.Task[Any]] = set()
        self._unread: dict[asyncio.Task[Any], str] = {}
        self._wrapped = lru_cache(_MAX_METHODS)(self._wrap)

    def refuse(self) -> set[asyncio.Task[Any]]:
        """Rejects new calls as `Unavailable` from now on, and returns the tasks of all open calls.

        Calls that wait for more requests are ended.
        """
        self._refuses = True
        self._cut(call for call in self._running if call.waits)
        return self._open.copy()

    def cut(self) -> None:
        """Ends all running calls with `Unavailable`."""
        self._cut(self._running)

    async def hold(self) -> bool:
        """Stops answering new calls, waits until none has arrived for a moment, and returns whether calls are held.

        A client that retries at once would always have a call in flight when the server stops, and gRPC would end it as
        CANCELLED. Held calls end as UNAVAILABLE when their connection closes.
        """
        self._held = 0
        for _ in range(_CHECKS):
            held = self._held
            await asyncio.sleep(_QUIET_S)
            if self._held == held:
                break
        return self._held > 0

    async def intercept_service(self, continuation: Any, details: grpc.HandlerCallDetails) -> Any:
        """Wraps the handler of a service."""
        handler = await continuation(details)
        if handler is None:
            return None
        task = asyncio.current_task()
        assert task is not None
        self._unread[task] = details.method
        task.add_done_callback(self._note_end)
        return self._wrapped(handler, details.method)

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        self._open.discard(task)
        if (path := self._unread.pop(task, None)) is not None and (name := self._name_of(path)) is not None:
            # The client left during its request, or gRPC rejected the request as too large.
            self._ended(name, grpc.StatusCode.CANCELLED, None)

    def _name_of(self, path: str) -> str | None:
        """Returns the name of a method if its service is one of `services`."""
        service, _, name = path.removeprefix("/").partition("/")
        return name if service in self._services else None

    def _cut(self, calls: Iterable[_Call]) -> None:
        for call in calls:
            if not call.is_cut:
                call.is_cut = True
                call.task.cancel()

    async def _refuse(self) -> NoReturn:
        if self._held is not None:
            self._held += 1
            await asyncio.Event().wait()
        raise Unavailable(ENDING)

    def _wrap(self, handler: Any, path: str) -> Any:
        kind = "stream" if handler.request_streaming else "unary"
        kind += "_stream" if handler.response_streaming else "_unary"
        method, name = getattr(handler, kind), self._name_of(path)

        def read(raw: bytes) -> Any:
            if handler.request_deserializer is None:
                return raw
            try:
                message = handler.request_deserializer(raw)
            except DecodeError:
                raise InvalidArgument(
                    f"The request of {path.rpartition('/')[2]} cannot be read: it is incomplete, or one of its texts "
                    "is not valid UTF-8."
                ) from None
            if name is not None:
                _refuse_unknown(message)
            return message

        async def read_each(requests: Any, call: _Call) -> AsyncIterator[Any]:
            iterator = aiter(requests)
            while not self._refuses:
                call.waits = True
                try:
                    raw = await anext(iterator)
                except StopAsyncIteration:
                    return
                finally:
                    call.waits = False
                yield read(raw)
            raise Unavailable(ENDING)

        async def answer(request: Any, context: Any) -> Any:
            async with self._call(path, name, context) as call:
                message = read_each(request, call) if handler.request_streaming else read(request)
                answered = method(message, context)
                if hasattr(answered, "__aiter__"):
                    async with aclosing(answered) as responses:
                        async for response in responses:
                            await context.write(response)
                    return None
                result = await answered
                if handler.response_streaming:
                    call.reason = result
                return result

        return handler._replace(request_deserializer=None, **{kind: answer})

    @asynccontextmanager
    async def _call(self, path: str, name: str | None, context: Any) -> AsyncIterator[_Call]:
        """Tracks a call while its method runs, with its span and its request id, and sends the status of an error.

        `name` is the name of the method, or None if its end is not reported.
        """
        task = asyncio.current_task()
        assert task is not None
        call = _Call(task, time.monotonic())
        self._unread.pop(task, None)
        self._running.add(call)
        self._open.add(task)
        metadata = context.invocation_metadata() or ()
        given_id = next((value for key, value in metadata if key == REQUEST_ID), None)
        with (
            nullcontext(_ignore) if name is None else traces.call(path, metadata) as end_span,
            logged_call(path.rpartition("/")[2], given_id) as (request_id, log_end),
        ):
            context.set_trailing_metadata(((REQUEST_ID, request_id),))

            def leave(code: grpc.StatusCode) -> None:
                """Reports the end of the method, before its client receives the status."""
                self._running.discard(call)
                if name is not None:
                    end_span(code)
                    log_end(code.name)
                    self._ended(name, code, call.reason)

            try:
                if self._refuses and not path.startswith(_HEALTH):
                    await self._refuse()
                yield call
            except BaseException as error:
                if call.is_cut and isinstance(error, asyncio.CancelledError):
                    task.uncancel()
                    error = Unavailable(ENDING)
                code = _code_of(error, context, call)
                leave(code)
                await _abort(context, path, code, error, request_id)
            else:
                leave(grpc.StatusCode.OK)


def _ignore(_: grpc.StatusCode) -> None:
    pass


def _code_of(error: BaseException, context: Any, call: _Call) -> grpc.StatusCode:
    match error:
        case GptloopError():
            return code_of(error)
        case grpc.aio.AbortError():
            return context.code() or grpc.StatusCode.UNKNOWN
        case asyncio.CancelledError():
            # A call is cancelled in the same way after its deadline and if its client leaves.
            remaining_s = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= _ROUNDING * (time.monotonic() - call.began_s)
            return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        case grpc.aio.InternalError() | GeneratorExit():
            # The client left while a message was written.
            return grpc.StatusCode.CANCELLED
        case _:
            return grpc.StatusCode.INTERNAL


async def _abort(context: Any, path: str, code: grpc.StatusCode, error: BaseException, request_id: str) -> None:
    if isinstance(error, GptloopError):
        await context.abort(code, bounded(str(error)), (*details_of(error), (REQUEST_ID, request_id)))
    if code is not grpc.StatusCode.INTERNAL or not isinstance(error, Exception):
        raise error
    logger.error("%s failed", path, exc_info=error, extra=with_ids(request_id=request_id))
    sentence = f"The server failed on this request; see its log for {request_id}."
    await context.abort(code, sentence, ((REQUEST_ID, request_id),))


def bounded(sentence: str) -> str:
    """Returns a sentence, shortened if it does not fit into a status."""
    encoded = sentence.encode(errors="replace")
    if len(encoded) <= MAX_SENTENCE_BYTES:
        return sentence
    return encoded[: MAX_SENTENCE_BYTES - 3].decode(errors="ignore") + "…"


def _refuse_unknown(message: Message, path: str = "") -> None:
    """Raises `InvalidArgument` if a message, or a message inside it, has a field that its contract does not know."""
    fields = UnknownFieldSet(message)
    if len(fields):
        raise InvalidArgument(
            f"The request has a field {path}{fields[0].field_number} that this server does not know; the client uses a "
            "newer contract."
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if isinstance(value, Message):
            within = [value]
        elif field.message_type.GetOptions().map_entry:
            is_message = field.message_type.fields_by_name["value"].message_type is not None
            within = list(value.values()) if is_message else []
        else:
            within = list(value)
        for one in within:
            _refuse_unknown(one, f"{path}{field.name}.")
