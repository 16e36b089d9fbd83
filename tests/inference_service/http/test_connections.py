"""What a client may take of the HTTP server: connections, time, and room for headers."""

import asyncio
import contextlib
import gc
import resource
import socket
import struct
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from inference_service.generation import ClientLeft
from inference_service.http import connections
from inference_service.http import server as server_module
from inference_service.http.server import HttpServer
from shared.service.access.tokens import Callers
from shared.service.listening import Address
from tests.waiting import HANG_S, eventually

GET = b"GET / HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class World:
    """A server of one page, `/`; requests for `/wait` run until their client leaves."""

    def __init__(self) -> None:
        self.begun, self.left = asyncio.Event(), asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []
        self.server = HttpServer(
            [Route("/", self._read, methods=["GET", "POST"]), Route("/wait", self._wait)], (), (), Callers()
        )
        self.port = self.server.start(Address("127.0.0.1", 0, "HOST", "PORT"))

    async def connect(self, sent: bytes = b"") -> Streams:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(sent)
        return reader, writer

    async def _read(self, request: Request) -> Response:
        try:
            return PlainTextResponse(f"{len(await request.body())} bytes")
        except ClientDisconnect as error:
            raise ClientLeft from error

    async def _wait(self, request: Request) -> Response:
        self.begun.set()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.left.set()
        return Response()


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for writer in world.writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    await world.server.stop(0.0, asyncio.Event())
    await world.server.close()


def run(test: Callable[[World], Awaitable[None]]) -> None:
    async def within() -> None:
        async with world() as made:
            await asyncio.wait_for(test(made), HANG_S)

    asyncio.run(within())


async def rest(reader: asyncio.StreamReader) -> bytes:
    """Returns what the server sends until it closes the connection."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1 << 16):
            received += part
    return received


@pytest.mark.parametrize("sent", [b"", b"GET / HT", GET, GET + b"x: y", POST, POST + b"1234"])
def test_a_request_that_does_not_arrive_ends_its_connection(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "ARRIVAL_S", 0.2)

    async def test(world: World) -> None:
        reader, _ = await world.connect(sent)
        assert await rest(reader) == b""

    run(test)


def test_a_request_that_has_arrived_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ARRIVAL_S", 1.0)

    async def test(world: World) -> None:
        _, writer = await world.connect(GET.replace(b"/", b"/wait", 1) + b"\r\n")
        await world.begun.wait()
        # Ends later than the request would.
        late, _ = await world.connect()
        assert await rest(late) == b""
        assert not world.left.is_set()
        writer.close()
        await world.left.wait()

    run(test)


def test_connections_beyond_the_limit_are_closed_until_others_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)

    async def test(world: World) -> None:
        (first, writer), _ = await world.connect(GET + b"\r\n"), await world.connect()
        assert (await first.readline()).startswith(b"HTTP/1.1 200")
        further, _ = await world.connect()
        assert await rest(further) == b""
        writer.write(GET + b"connection: close\r\n\r\n")
        assert b"0 bytes" in await rest(first)
        again, _ = await world.connect(GET + b"\r\n")
        assert (await again.readline()).startswith(b"HTTP/1.1 200")

    run(test)


def test_a_connection_that_its_client_resets_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_IDLE_S", 1000)

    async def test(world: World) -> None:
        reader, writer = await world.connect(GET + b"\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        (connection,) = map(weakref.ref, world.server._server.server_state.connections)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

        def is_forgotten() -> bool:
            gc.collect()
            return connection() is None

        await eventually(is_forgotten)

    run(test)


def test_few_open_files_leave_room_for_others_than_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))

    async def test(world: World) -> None:
        kept = [await world.connect(), await world.connect()]
        further, _ = await world.connect()
        assert await rest(further) == b""
        assert not any(reader.at_eof() for reader, _ in kept)

    run(test)


@pytest.mark.parametrize("begin", [b"GET /?", GET, GET + b"x: "])
@pytest.mark.parametrize("is_answered", [False, True])
def test_a_head_that_is_too_long_is_refused(begin: bytes, is_answered: bool) -> None:
    async def test(world: World) -> None:
        reader, writer = await world.connect()
        if is_answered:
            writer.write(POST + b"123456789")
            assert (await reader.readuntil(b"9 bytes")).startswith(b"HTTP/1.1 200")
        size = connections.MAX_HEAD_BYTES + 1
        lines = b"x: y\r\n" * size if begin == GET else b"x" * size
        writer.write((begin + lines)[:size])
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 431 ")
        assert b"The headers have more than 65,536 bytes." in answer

    run(test)


def test_a_long_head_is_read_whole_and_a_body_is_not_a_part_of_it() -> None:
    async def test(world: World) -> None:
        body = b"x" * (1 << 20)
        head = b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\nx: " % len(body)
        head += b"x" * (connections.MAX_HEAD_BYTES - len(head) - 4) + b"\r\n\r\n"
        reader, writer = await world.connect(head + body)
        assert (await reader.readuntil(b" bytes")).endswith(b"1048576 bytes")
        writer.write(head + body)
        assert (await reader.readuntil(b" bytes")).endswith(b"1048576 bytes")

    run(test)


def test_a_second_request_during_another_one_ends_both() -> None:
    async def test(world: World) -> None:
        wait = GET.replace(b"/", b"/wait", 1) + b"\r\n"
        reader, writer = await world.connect(wait)
        await world.begun.wait()
        writer.write(wait)
        await world.left.wait()
        assert await rest(reader) == b""

    run(test)


@pytest.mark.parametrize(("age_s", "answers"), [(0.0, 1), (HANG_S, 3)])
def test_an_old_connection_ends_with_its_next_answer(
    monkeypatch: pytest.MonkeyPatch, age_s: float, answers: int
) -> None:
    monkeypatch.setattr(connections, "MAX_AGE_S", age_s)

    async def test(world: World) -> None:
        reader, writer = await world.connect()
        for number in range(answers):
            writer.write(GET + b"\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(7) == b"0 bytes"
            assert (b"connection: close" in head) == (age_s == 0.0), number
        if age_s == 0.0:
            assert await rest(reader) == b""

    run(test)
