import asyncio
import socket

import pytest

from inference_service.http.listener import Listener
from tests.asynchronous import async_test
from tests.waiting import eventually

MOST = 2


@async_test
async def test_connections_beyond_the_limit_are_closed_until_others_have_ended() -> None:
    class Greeting(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"hello")

    bound = socket.create_server(("127.0.0.1", 0))
    place = bound.getsockname()
    listener = Listener(bound, MOST)
    listener.setblocking(False)
    server = await asyncio.get_running_loop().create_server(Greeting, sock=listener)

    async def greeting() -> tuple[bytes, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*place)
        try:
            return await reader.read(5), writer
        except ConnectionError:
            return b"", writer

    open_writers = []
    for _ in range(MOST):
        answer, writer = await greeting()
        assert answer == b"hello"
        open_writers.append(writer)
    answer, refused = await greeting()
    assert answer == b""
    open_writers.pop().close()
    await eventually(lambda: any(each.fileno() == -1 for each in listener._open))
    answer, writer = await greeting()
    assert answer == b"hello"
    for each in (*open_writers, refused, writer):
        each.close()
    server.close()


def test_a_full_listener_closes_one_connection_at_a_time() -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    with Listener(bound, 1) as listener:
        clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
        accepted, _ = listener.accept()
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert clients[1].recv(1) == b""
        clients[2].setblocking(False)
        with pytest.raises(BlockingIOError):
            clients[2].recv(1)
        for each in (accepted, *clients):
            each.close()
