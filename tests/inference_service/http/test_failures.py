"""Mistakes of the server, over real connections."""

import asyncio
import logging

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference_service.http.server import HttpServer
from shared.service.access.tokens import Callers
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.waiting import HANG_S


async def fail(_: Request) -> Response:
    raise ZeroDivisionError("a mistake")


@async_test
async def test_a_mistake_is_answered_and_logged_once_with_its_request(caplog: pytest.LogCaptureFixture) -> None:
    server = HttpServer([Route("/wrong", fail)], (), (), Callers())
    port = server.start(Address("127.0.0.1", 0, "HOST", "PORT"))
    try:
        with caplog.at_level(logging.ERROR):
            async with httpx.AsyncClient(timeout=HANG_S) as client:
                answer = await client.get(f"http://127.0.0.1:{port}/wrong", headers={"x-request-id": "my-call"})
    finally:
        await server.stop(HANG_S, asyncio.Event())
        await server.close()
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "The server failed on this request; see its log for my-call.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert answer.headers["x-request-id"] == "my-call"
    (record,) = caplog.records
    assert record.getMessage() == "GET /wrong failed"
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
