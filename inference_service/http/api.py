"""The routes of OpenAI's API."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from inference_service.generation import ClientLeft, Generations
from inference_service.http.body import read_body
from inference_service.http.completions import CompletionRequest, complete
from inference_service.http.connections import abort
from inference_service.http.errors import HttpError, code_name, error_body, error_response
from inference_service.http.failures import failure
from inference_service.versions.catalogue import Catalogue
from inference_service.write_timeouts import WriteTimeouts
from shared.errors import GptloopError, ResourceExhausted
from shared.registry.manifest import VersionManifest

_NO_CHAT = (
    "The versions of this server are base models, which continue text and follow no instructions; use "
    "/v1/completions with the beginning of a text."
)

# Small, so that a client that reads slowly but steadily gets all of them in time.
_PIECE_BYTES = 64 << 10

Result = TypeVar("Result")


def api_routes(
    generations: Generations,
    catalogue: Catalogue,
    write_timeouts: WriteTimeouts,
    ended: Callable[[str], None],
) -> list[Route]:
    """Returns the routes below `/v1`; `ended` is called with the finish reason or status code of each completion."""

    async def list_models(_: Request) -> JSONResponse:
        await catalogue.look()
        return JSONResponse({"object": "list", "data": _models(catalogue)})

    async def model(request: Request) -> JSONResponse:
        await catalogue.look()
        name = request.path_params["name"]
        for each in _models(catalogue):
            if each["id"] == name:
                return JSONResponse(each)
        raise HttpError(404, f"There is no model {name!r}; /v1/models lists them.", "model", "model_not_found")

    async def refuse_chat(_: Request) -> JSONResponse:
        raise HttpError(400, _NO_CHAT)

    return [
        Route("/v1/completions", _Completions(generations, write_timeouts, ended), methods=["POST"]),
        Route("/v1/chat/completions", refuse_chat, methods=["POST"]),
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", model),
    ]


def _models(catalogue: Catalogue) -> list[dict[str, Any]]:
    """Returns the labels and the versions as models, the newest version first."""
    versions = {each.version: each for each in catalogue.versions}
    labels = [(label, versions[number]) for label, number in catalogue.labels().items() if number in versions]
    numbered = [(str(number), each) for number, each in sorted(versions.items(), reverse=True)]
    return [_model(name, manifest) for name, manifest in [*labels, *numbered]]


def _model(name: str, manifest: VersionManifest) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(manifest.created_at),
        "owned_by": "gptloop",
        "root": str(manifest.version),
        "max_model_len": manifest.model["context_length"],
        "system_fingerprint": manifest.digest,
    }


class _Completions:
    """`POST /v1/completions`: one response, or server-sent events from the moment at which the request has a slot."""

    def __init__(self, generations: Generations, write_timeouts: WriteTimeouts, ended: Callable[[str], None]) -> None:
        self._generations = generations
        self._write_timeouts = write_timeouts
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; its slots are free within a step after its client has left."""
        answer = _Answer(scope, send, self._write_timeouts)
        reason = "cancelled"
        try:
            request = await read_body(Request(scope, receive), CompletionRequest)
            work = complete(request, self._generations, scope["state"]["caller"], answer.send_event)
            last, finished = await _while_connected(receive, work)
            if request.stream:
                await answer.end_events(last)
            else:
                await answer.send_whole(last)
            reason = finished
        except GptloopError as error:
            reason = code_name(error)
            await answer.send_error(error)
        except Exception:
            reason = "internal"
            if not answer.started:
                raise
            await answer.send_error(failure(scope))
        finally:
            self._ended(reason)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of some work; cancels it and raises `ClientLeft` if the client leaves before."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.wait((working, leaving))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Answer:
    """Writes one response: whole, or as server-sent events, whose head goes out with the first one.

    A client that does not read a piece in time loses its connection: nothing that it can still be told would reach it.
    """

    def __init__(self, scope: Scope, send: Send, write_timeouts: WriteTimeouts) -> None:
        self._transport: asyncio.Transport = scope["state"]["transport"]
        self._send = send
        self._write_timeouts = write_timeouts
        self.started = False

    async def send_event(self, event: str) -> None:
        """Writes an event; raises `ResourceExhausted` if the client does not read it in time."""
        await self._begin("text/event-stream; charset=utf-8", cache_control="no-store")
        await self._write(f"data: {event}\n\n".encode())

    async def end_events(self, event: str) -> None:
        """Writes the last event, if it is not empty, and the end of the stream."""
        if event:
            await self.send_event(event)
        await self.send_event("[DONE]")
        await self._end()

    async def send_whole(self, body: str) -> None:
        """Writes a response in pieces; raises `ResourceExhausted` if the client does not read one in time."""
        content = body.encode()
        await self._begin("application/json", content_length=str(len(content)))
        for start in range(0, len(content), _PIECE_BYTES):
            await self._write(content[start : start + _PIECE_BYTES])
        await self._end()

    async def send_error(self, error: GptloopError) -> None:
        """Writes an error as the response or as the last event, unless the client does not read."""
        if self._transport.is_closing():
            return
        with contextlib.suppress(ResourceExhausted):
            if self.started:
                await self.end_events(json.dumps(error_body(error)))
            else:
                response = error_response(error)
                self.started = True
                await self._write_message(
                    {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
                )
                await self._write(bytes(response.body))
                await self._end()

    async def _begin(self, kind: str, **headers: str) -> None:
        if not self.started:
            self.started = True
            named = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
            raw = [(name.encode(), value.encode()) for name, value in named.items()]
            await self._write_message({"type": "http.response.start", "status": 200, "headers": raw})

    async def _write(self, content: bytes) -> None:
        await self._write_message({"type": "http.response.body", "body": content, "more_body": True})

    async def _end(self) -> None:
        await self._write_message({"type": "http.response.body", "body": b""})

    async def _write_message(self, message: Message) -> None:
        try:
            async with self._write_timeouts.limit():
                await self._send(message)
        except ResourceExhausted:
            abort(self._transport)
            # Lets uvicorn see it, which would complain about half a response.
            await asyncio.sleep(0)
            raise
