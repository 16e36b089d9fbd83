"""The queue of commands from other threads to the engine, and the only lock between them.

Any thread may add commands and close the inbox. Only the engine's thread takes commands, resolves futures and reports
which requests have ended.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from inference_service.engine.request import Failed, Finished, GenerationRequest, Output
from shared.errors import Unavailable

Command = Callable[[], None]


class Inbox:
    """Commands in the order of their arrival, the futures that some of them resolve, and the requests that are open.

    A closed inbox takes no more commands: `post` raises `Unavailable`, and `promise` sets it as the future's exception.
    """

    def __init__(self) -> None:
        # Guards all below.
        self._changed = threading.Condition()
        self._commands: list[Command] = []
        self._promises: set[Future[Any]] = set()
        # How many samples of each request have not ended.
        self._open: dict[str, int] = {}
        self._closed: str | None = None

    def post(self, command: Command, opens: GenerationRequest | None = None) -> None:
        """Adds a command; `opens` is the request that begins with it."""
        with self._changed:
            if self._closed is not None:
                raise Unavailable(self._closed)
            self._commands.append(command)
            if opens is not None:
                self._open[opens.id] = opens.samples
            self._changed.notify()

    def promise(self, promise: Future[Any], command: Command) -> None:
        """Adds a command that will resolve a future by `keep`."""
        # Its caller may stop waiting, but cannot cancel it.
        promise.set_running_or_notify_cancel()
        with self._changed:
            try:
                self.post(command)
            except Unavailable as error:
                promise.set_exception(error)
            else:
                self._promises.add(promise)

    def close(self, reason: str) -> None:
        """Fails all futures with `Unavailable`. Requests stay open until the engine ends them."""
        with self._changed:
            self._closed = self._closed or reason
            for promise in self._promises:
                promise.set_exception(Unavailable(self._closed))
            self._promises.clear()
            self._changed.notify()

    def take(self, wait: bool) -> list[Command] | None:
        """Takes all commands, for the engine's thread; waits for the first one if asked to. None if closed."""
        with self._changed:
            self._changed.wait_for(lambda: not wait or self._commands or self._closed)
            commands, self._commands = self._commands, []
            return None if self._closed else commands

    def keep(self, promise: Future[Any], result: object) -> None:
        """Resolves a future with a result or an exception, for the engine's thread."""
        with self._changed:
            # A future that is missing here failed when the inbox was closed.
            if promise in self._promises:
                self._promises.remove(promise)
                if isinstance(result, Exception):
                    promise.set_exception(result)
                else:
                    promise.set_result(result)

    def note_ends(self, outputs: Sequence[Output]) -> None:
        """Removes requests whose last sample ends with one of these outputs, for the engine's thread."""
        with self._changed:
            for output in outputs:
                if isinstance(output.event, Finished | Failed):
                    self._open[output.request_id] -= 1
                    if self._open[output.request_id] == 0:
                        del self._open[output.request_id]

    def fail_open(self) -> list[Output]:
        """Ends each open request with `Unavailable`, for the engine's thread after the inbox is closed."""
        with self._changed:
            assert self._closed is not None
            outputs = [Output(request_id, 0, Failed(Unavailable(self._closed))) for request_id in self._open]
            self._open.clear()
            return outputs
