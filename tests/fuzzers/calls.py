"""Odd calls and connections to live servers."""

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
from google.protobuf.message import Message

from tests.fuzzers.area import BAD_CODES, CALL_S, Area
from tests.mutations import json_bytes, odd_bytes, odd_json, odd_message


def methods(module: Any) -> Iterator[tuple[str, type[Message]]]:
    """Yields the path and the request of each method of a contract."""
    for service in module.DESCRIPTOR.services_by_name.values():
        for method in service.methods:
            yield f"/{service.full_name}/{method.name}", getattr(module, method.input_type.name)


def try_grpc(rng: random.Random, area: Area, channel: Any, module: Any) -> None:
    """Calls a method with odd bytes, a changed message, or a message of odd values."""
    path, kind = rng.choice(list(methods(module)))
    raw = odd_message(rng, kind).SerializeToString()
    match rng.randrange(4):
        case 0:
            raw = rng.randbytes(rng.randrange(60))
        case 1:
            raw = odd_bytes(rng, raw)
    area.tried()
    # Watching a job that waits ends with the deadline.
    endless = path.endswith("WatchJob")
    limit_s = 0.3 if endless else CALL_S
    if rng.random() < 0.1:
        limit_s = rng.random() / 20
        endless = True
    try:
        for number, _ in enumerate(channel.unary_stream(path)(raw, timeout=limit_s)):
            if number > 3:
                break
    except grpc.RpcError as error:
        if error.code() in BAD_CODES and not (endless and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED):
            area.fell(f"{path} {error.code().name} {error.details()}"[:150], raw)


HTTP_PATHS = (
    *(
        "v1/completions",
        "v1/chat/completions",
        "v1/models",
        "v1/models/best",
        "api/server",
        "api/runs",
        "api/runs/tiny",
    ),
    *("api/versions", "api/versions/1/load", "api/versions/1/unload", "api/versions/1/promote", "api/policy"),
    *("api/rollback", "", "web/app.js", "web/../secret"),
)

COMPLETION = {
    "prompt": ["Once", "a"],
    "model": "best",
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 1,
    "stop": ["x"],
    "seed": 1,
    "logprobs": 2,
    "echo": False,
    "stream": False,
    "stream_options": {"include_usage": True},
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {"5": 1.5},
    "best_of": 1,
    "user": "u",
    "top_k": 5,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": True,
}

_BODIES: dict[str, object] = {"api/policy": {"label": "best"}, "api/rollback": {"version": 1}}


def try_http(rng: random.Random, area: Area, client: httpx.Client, url: str) -> None:
    """Sends a request with odd JSON, odd bytes or an odd path."""
    path = rng.choice(HTTP_PATHS) if rng.random() < 0.5 else "v1/completions"
    body: object = _BODIES.get(path, COMPLETION if path.startswith("v1") else {})
    for _ in range(rng.choice((1, 1, 2, 4))):
        body = odd_json(rng, body)
    content = json_bytes(body)
    if rng.random() < 0.3:
        content = odd_bytes(rng, content)
    if rng.random() < 0.2:
        path = odd_bytes(rng, path.encode())[:3000].decode("latin-1")
        path = "".join(f"%{ord(one):02x}" if not one.isalnum() and one not in "/." else one for one in path)
    method = rng.choice(("POST", "POST", "POST", "GET", "PUT", "OPTIONS", "DELETE"))
    headers = {"content-type": rng.choice(("application/json", "application/json; charset=x", "text/plain", ""))}
    if rng.random() < 0.7:
        headers["content-type"] = "application/json"
    area.tried()
    try:
        answer = client.request(method, f"{url}{path.lstrip('/')}", content=content, headers=headers, timeout=CALL_S)
        if answer.status_code >= 500 and answer.status_code != 503:
            area.fell(f"{method} {path[:60]} {answer.status_code} {answer.text[:80]}", content)
    except httpx.TimeoutException:
        area.fell(f"{method} {path[:60]} hangs", content)
    except httpx.HTTPError:
        # The server may refuse to go on with a connection.
        pass


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def garbage(rng: random.Random) -> bytes:
    """Returns the beginning of a connection that is wrong at some point."""
    frame = lambda kind, flags, stream, content: (  # noqa: E731
        len(content).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + content
    )
    frames = b"".join(
        frame(
            rng.randrange(12), rng.randrange(256), rng.choice((0, 1, 2, 3, 2**31 - 1)), rng.randbytes(rng.randrange(40))
        )
        for _ in range(rng.randrange(5))
    )
    request = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return rng.choice(
        (
            rng.randbytes(rng.randrange(200)),
            _PREFACE + frames,
            _PREFACE + frame(4, 0, 0, b"") + frames,
            _PREFACE + frame(4, 0, 0, b"") + frame(1, 4, 1, rng.randbytes(30)),
            b"\x16\x03\x01" + rng.randbytes(60),
            odd_bytes(rng, request + b"content-length: 2\r\n\r\n{}"),
            odd_bytes(rng, request + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
            request + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
            request + b"content-length: 99999999999999999999\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * rng.randrange(3000) + b"\r\n",
            b"",
        )
    )


def try_connection(rng: random.Random, area: Area, port: int, kept: list[socket.socket]) -> None:
    """Opens a connection, sends garbage, and leaves it open, closes it, or resets it."""
    area.tried()
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(garbage(rng))
    except OSError:
        return
    match rng.randrange(4):
        case 0:
            kept.append(connection)
            if len(kept) > 100:
                kept.pop(0).close()
            return
        case 1:
            connection.settimeout(0.02)
            with contextlib.suppress(OSError):
                connection.recv(4096)
        case 2:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
    connection.close()
