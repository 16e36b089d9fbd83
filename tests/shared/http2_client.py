"""A client with just enough HTTP/2 to ping a server at any rate."""

import asyncio
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ACK = 1


class PingingClient:
    """A connection without calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Self:
        """Opens a connection and sends the preface."""
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        client._writer.write(_PREFACE)
        client._send(_SETTINGS, b"")
        return client

    async def ping(self) -> str:
        """Pings the server; returns an empty text for its answer, or its reason if it closes the connection."""
        self._send(_PING, b"are you?")
        while True:
            kind, flags, content = await self._receive()
            if kind == _PING and flags & _ACK:
                return ""
            if kind == _GOAWAY:
                return content[8:].decode()

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()

    def _send(self, kind: int, content: bytes) -> None:
        # Length, type, no flags, stream 0.
        self._writer.write(len(content).to_bytes(3) + bytes([kind, 0]) + bytes(4) + content)

    async def _receive(self) -> tuple[int, int, bytes]:
        head = await self._reader.readexactly(9)
        return head[3], head[4], await self._reader.readexactly(int.from_bytes(head[:3]))
