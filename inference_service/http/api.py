"""The routes of OpenAI's API."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from inference_service.generation import ClientLeft, Generations
from inference_service.http.body import read_body
from inference_service.http.completions import CompletionRequest, complete
from inference_service.http.errors import HttpError, error_body, error_response
from inference_service.versions.catalogue import Catalogue
from inference_service.write_timeouts import WriteTimeouts
from shared.errors import GptloopError
from shared.registry.manifest import VersionManifest

_NO_CHAT = (
    "The versions of this server are base models, which continue text and follow no instructions; use "
    "/v1/completions with the beginning of a text."
)

Result = TypeVar("Result")


def api_routes(
    generations: Generations, catalogue: Catalogue, write_timeouts: WriteTimeouts, slots: int
) -> list[Route]:
    """Returns the routes below `/v1`."""

    async def list_models(_: Request) -> JSONResponse:
        await catalogue.look()
        return JSONResponse({"object": "list", "data": _models(catalogue)})

    async def model(request: Request) -> JSONResponse:
        await catalogue.look()
        name = request.path_params["name"]
        for each in _models(catalogue):
            if each["id"] == name:
                return JSONResponse(each)
        raise HttpError(404, f"There is no model {name!r}; /v1/models lists them.", "model")

    async def refuse_chat(_: Request) -> JSONResponse:
        raise HttpError(400, _NO_CHAT)

    return [
        Route("/v1/completions", _Completions(generations, write_timeouts, slots), methods=["POST"]),
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

    def __init__(self, generations: Generations, write_timeouts: WriteTimeouts, slots: int) -> None:
        self._generations = generations
        self._write_timeouts = write_timeouts
        self._slots = slots

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; its slots are free within a step after its client has left."""
        events = _Events(send, self._write_timeouts)
        try:
            request = await read_body(Request(scope, receive), CompletionRequest)
            answer = await _while_connected(receive, complete(request, self._generations, self._slots, events.send))
            if request.stream:
                await events.end(answer)
            else:
                await JSONResponse(answer)(scope, receive, send)
        except ClientLeft:
            return
        except GptloopError as error:
            if events.started:
                await events.end(error_body(error))
            else:
                await error_response(error)(scope, receive, send)


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


class _Events:
    """Writes server-sent events; the head of the response goes out with the first one."""

    def __init__(self, send: Callable[[Any], Awaitable[None]], write_timeouts: WriteTimeouts) -> None:
        self._send = send
        self._write_timeouts = write_timeouts
        self.started = False

    async def send(self, event: dict[str, Any]) -> None:
        """Writes an event; raises `ResourceExhausted` if the client does not read it in time."""
        await self._write(f"data: {json.dumps(event, separators=(',', ':'))}\n\n")

    async def end(self, event: dict[str, Any]) -> None:
        """Writes the last event, if it is not empty, and the end of the stream."""
        if event:
            await self.send(event)
        await self._write("data: [DONE]\n\n")
        await self._send({"type": "http.response.body", "body": b""})

    async def _write(self, text: str) -> None:
        async with self._write_timeouts.limit():
            if not self.started:
                self.started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": text.encode(), "more_body": True})
