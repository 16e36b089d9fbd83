"""A TCP port before a Redis, as a load balancer or stunnel is one: where it leads and its certificate can change."""

import asyncio
import ssl
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from tests.certificates import Pair


class Relay:
    """Passes connections on to a unix socket, until `end`; with a certificate, it speaks TLS only.

    target: where new connections lead.
    """

    def __init__(self, target: Path, pair: Pair | None = None) -> None:
        self.target = target
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if pair else None
        if pair:
            self.show(pair)
        self._tasks: set[asyncio.Task[object]] = set()
        started: Future[int] = Future()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(started),), name="relay")
        self._thread.start()
        self.port = started.result()

    def show(self, pair: Pair) -> None:
        """Shows another certificate to new connections."""
        assert self._context is not None
        self._context.load_cert_chain(pair.certificate, pair.key)

    def cut(self) -> None:
        """Ends all connections."""
        self._loop.call_soon_threadsafe(self._cancel)

    def end(self) -> None:
        """Stops."""
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _run(self, started: Future[int]) -> None:
        self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
        # A client that refuses the certificate is the subject of a test, not a fault.
        self._loop.set_exception_handler(lambda *_: None)
        server = await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._context)
        started.set_result(server.sockets[0].getsockname()[1])
        await self._ending.wait()
        server.close()
        self._cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        try:
            with suppress(OSError, asyncio.CancelledError):
                answers, requests = await asyncio.open_unix_connection(str(self.target))
                writers.append(requests)
                both = [asyncio.create_task(_copy(reader, requests)), asyncio.create_task(_copy(answers, writer))]
                try:
                    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for half in both:
                        half.cancel()
                    await asyncio.gather(*both, return_exceptions=True)
        finally:
            for each in writers:
                each.transport.abort()
            self._tasks.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
