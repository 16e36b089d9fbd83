"""What HTTP clients get from a server that is full, slow, broken or stopping: real processes, real calls."""

import json
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.process import BREAKABLE, SERVE, Server
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

# Enough context for a stream of several seconds, and for an answer that no buffer holds.
LONG = replace(TINY, context_length=16384)
ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 16000, "ignore_eos": True, "stream": True}


def start(var: Path, command: Any = SERVE, **settings: float) -> Server:
    server = Server(var, command, **{f"GPTLOOP_INFERENCE_{name}": str(value) for name, value in settings.items()})
    publish_tiny_version(server.registry, 1.0, config=LONG)
    wait_until(server.serves)
    return server


def end(server: Server) -> None:
    assert server.end() == 0, server.lines
    log = "".join(server.lines)
    assert "Traceback" not in log and "ASGI" not in log, log


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two slots and room for two waiting requests, which soon ends streams of slow readers."""
    server = start(
        tmp_path_factory.mktemp("server") / "var",
        SLOTS=2,
        MAX_WAITING_REQUESTS=2,
        MAX_WAITING_PROMPT_TOKENS=50,
        SLOW_READER_S=1,
        DRAIN_S=1,
    )
    try:
        yield server
    finally:
        end(server)


def post(server: Server, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.page_url}v1/completions", json=body, timeout=HANG_S)


def metric(server: Server, *name: str) -> float:
    return server.metrics().get((f"gptloop_inference_{name[0]}", *name[1:]), 0.0)


def send(server: Server, body: dict[str, Any], *, half: bool = False) -> socket.socket:
    """Sends a request, or half of it, on a connection that buffers little."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(HANG_S)
    connection.connect(("127.0.0.1", httpx.URL(server.page_url).port))
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content[: len(content) // 2 if half else None])
    return connection


def has_ended(connection: socket.socket) -> bool:
    """Returns whether the server has ended a connection, without reading from it."""
    poller = select.poll()
    poller.register(connection, 0)
    return bool(poller.poll(0))


def read_all(connection: socket.socket) -> str:
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content.decode()


def test_a_batch_neither_refuses_itself_nor_fills_the_queue(server: Server) -> None:
    for samples in (1, 2):
        prompts = [f"{number:40}" for number in range(16)]
        answer = post(server, prompt=prompts, n=samples, max_tokens=2, seed=1)
        assert answer.status_code == 200, answer.text
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(16 * samples))
    with httpx.stream(
        "POST", f"{server.page_url}v1/completions", json=ENDLESS | {"prompt": ["a"] * 16}, timeout=HANG_S
    ) as batch:
        next(batch.iter_lines())
        assert metric(server, "waiting_requests") <= 2
    wait_until(lambda: metric(server, "active_streams") == 0)


def test_a_full_queue_says_when_to_try_again(server: Server) -> None:
    with ExitStack() as stack:
        connections = [stack.enter_context(send(server, ENDLESS)) for _ in range(2)]
        wait_until(lambda: metric(server, "active_streams") == 2)
        connections += [stack.enter_context(send(server, ENDLESS)) for _ in range(2)]
        wait_until(lambda: metric(server, "waiting_requests") == 2)
        refused = post(server, prompt="x")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "2 requests are waiting already" in refused.json()["error"]["message"]
    wait_until(lambda: metric(server, "active_streams") + metric(server, "waiting_requests") == 0)


def test_a_stream_that_is_not_read_ends(server: Server) -> None:
    before = metric(server, "version_requests_total", "resource_exhausted", "1")
    with send(server, ENDLESS | {"logprobs": 20}) as connection:
        wait_until(lambda: has_ended(connection))
    wait_until(lambda: metric(server, "active_streams") == 0)
    assert metric(server, "version_requests_total", "resource_exhausted", "1") == before + 1


def test_a_response_that_is_not_read_ends(server: Server) -> None:
    body = {"prompt": "x" * 16000, "echo": True, "logprobs": 20, "n": 2, "max_tokens": 1}
    with send(server, body) as connection:
        wait_until(lambda: has_ended(connection))
    assert post(server, prompt="x").status_code == 200


def test_one_version_answers_all_prompts_of_a_batch(tmp_path: Path) -> None:
    server = start(tmp_path / "var", SLOTS=2)
    body = ENDLESS | {"prompt": ["a"] * 4, "max_tokens": 4000}
    try:
        with httpx.stream("POST", f"{server.page_url}v1/completions", json=body, timeout=HANG_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            publish_tiny_version(server.registry, 0.5, seed=2, config=LONG)
            with server.client() as client:
                wait_until(lambda: client.model().version == 2)
            events = (json.loads(line.removeprefix("data: ")) for line in lines if line)
            later = next(event for event in events if event["choices"][0]["index"] >= 2)
        assert later["model"] == "1"
    finally:
        end(server)


def test_a_large_response_arrives_whole(server: Server) -> None:
    answer = post(server, prompt="x" * 16000, echo=True, logprobs=3, n=2, max_tokens=1, seed=1)
    assert int(answer.headers["content-length"]) == len(answer.content) > 1 << 20
    for choice in answer.json()["choices"]:
        assert choice["text"].startswith("x" * 16000)
        assert len(choice["logprobs"]["tokens"]) == 16001


def test_an_error_ends_a_stream_as_its_last_event(tmp_path: Path) -> None:
    server = start(tmp_path / "var", BREAKABLE)
    try:
        with httpx.stream("POST", f"{server.page_url}v1/completions", json=ENDLESS, timeout=HANG_S) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.order("fail once")
            events = [line.removeprefix("data: ") for line in lines if line]
        assert answer.status_code == 200
        assert events[-1] == "[DONE]"
        error = json.loads(events[-2])["error"]
        assert error["type"] == "server_error" and error["message"].endswith(".")
    finally:
        server.end()
    assert "ASGI" not in "".join(server.lines)


def test_sigterm_finishes_streams_and_answers_half_a_request(tmp_path: Path) -> None:
    server = start(tmp_path / "var", DRAIN_S=3)
    body = ENDLESS | {"max_tokens": 1000}
    with (
        send(server, {"prompt": "x" * 100}, half=True) as half,
        httpx.stream("POST", f"{server.page_url}v1/completions", json=body, timeout=HANG_S) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        refused = read_all(half)
    server.process.wait(HANG_S)
    end(server)
    assert refused.startswith("HTTP/1.1 503 ")
    assert "The server is stopping; try again in a moment." in refused
