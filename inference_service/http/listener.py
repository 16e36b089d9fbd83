"""The listening socket of the HTTP server."""

import socket
from typing import Any


class Listener(socket.socket):
    """Listens like another socket, which it replaces, and closes connections while `most` are open.

    It counts what the server does not know yet: connections whose TLS handshake has not ended.
    """

    def __init__(self, bound: socket.socket, most: int) -> None:
        super().__init__(fileno=bound.detach())
        self._most = most
        self._open: set[socket.socket] = set()

    def accept(self) -> tuple[socket.socket, Any]:
        """Accepts the next connection; raises `BlockingIOError` if there is none, or if it must not stay open.

        Then the event loop does what else is due before it asks again.
        """
        connection, peer = super().accept()
        if len(self._open) >= self._most:
            self._open = {each for each in self._open if each.fileno() != -1}
        if len(self._open) >= self._most:
            connection.close()
            raise BlockingIOError
        self._open.add(connection)
        return connection, peer
