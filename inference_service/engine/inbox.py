"""What other threads ask of the engine, and the only lock between them and it.

Any thread may ask and close. The engine's thread alone takes what was asked, keeps promises and says what has ended.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from inference_service.engine.request import Failed, Finished, GenerationRequest, Output
from shared.errors import Unavailable

Command = Callable[[], None]


class Inbox:
    """Commands in the order in which they were given, the promises that some of them are to keep, and the requests that
    have not ended. Once it is closed it takes nothing more, and what is asked raises or promises `Unavailable`."""

    def __init__(self) -> None:
        # Guards all below.
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._promises: set[Future[Any]] = set()
        # How many samples of each request have not ended.
        self._open: dict[str, int] = {}
        self._closed: str | None = None

    def post(self, command: Command, opens: GenerationRequest | None = None) -> None:
        """Asks for something; `opens` is the request that begins with it."""
        with self._changed:
            if self._closed is not None:
                raise Unavailable(self._closed)
            self._commands.append(command)
            if opens is not None:
                self._open[opens.id] = opens.samples
            self._changed.notify()

    def promise(self, promise: Future[Any], command: Command) -> None:
        """Asks for something that is to `keep` a promise."""
        # Whoever waits for it may give up, but cannot take it back.
        promise.set_running_or_notify_cancel()
        with self._changed:
            try:
                self.post(command)
            except Unavailable as error:
                promise.set_exception(error)
            else:
                self._promises.add(promise)

    def close(self, reason: str) -> None:
        """Breaks all promises. Requests stay open: how they end is the engine's to say."""
        with self._changed:
            self._closed = self._closed or reason
            for promise in self._promises:
                promise.set_exception(Unavailable(self._closed))
            self._promises.clear()
            self._changed.notify()

    def take(self, wait: bool) -> list[Command] | None:
        """For the engine's thread: what was asked since, and `wait` until something is. None where it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: not wait or self._commands or self._closed)
            commands, self._commands = self._commands, []
            return None if self._closed else commands

    def keep(self, promise: Future[Any], result: object) -> None:
        """For the engine's thread: keeps a promise, with a result or an exception."""
        with self._changed:
            # Where it is not there, it was broken when the inbox was closed.
            if promise in self._promises:
                self._promises.remove(promise)
                if isinstance(result, Exception):
                    promise.set_exception(result)
                else:
                    promise.set_result(result)

    def note_ends(self, outputs: Sequence[Output]) -> None:
        """For the engine's thread: the requests whose last sample ends with one of these are not open any more."""
        with self._changed:
            for output in outputs:
                if isinstance(output.event, Finished | Failed):
                    self._open[output.request_id] -= 1
                    if self._open[output.request_id] == 0:
                        del self._open[output.request_id]

    def fail_open(self) -> list[Output]:
        """For the engine's thread, once it is closed: how the requests that are still open end."""
        with self._changed:
            assert self._closed is not None
            outputs = [Output(request_id, 0, Failed(Unavailable(self._closed))) for request_id in self._open]
            self._open.clear()
            return outputs
