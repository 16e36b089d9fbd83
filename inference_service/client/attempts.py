"""Decides whether a failed call is retried, and which error its caller gets."""

import math
import random
import time

import grpc

from shared.errors import DeadlineExceeded, GptloopError, InvalidArgument, ResourceExhausted, Unavailable
from shared.service.grpc_status import error_of

# Both pauses of a call together are longer than the channel waits between two attempts to connect: a call in between
# fails without being sent.
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 5.0
# If the server asks for a longer wait, the caller gets the error.
_LONGEST_ASKED_S = 60.0
# The command that starts a server.
START = "gptloop up"


class Attempts:
    """The attempts at one call: at most `retries` after the first one, all of them before the deadline.

    A call is retried after `Unavailable`, and after `ResourceExhausted` with `retry_after_s`, unless a part of the
    answer has arrived. Retries are safe because no call changes anything on the server.

    `timeout_s` limits the whole call; None means no limit. Raises `InvalidArgument` if it is not a positive number.
    """

    def __init__(self, address: str, retries: int, timeout_s: float | None) -> None:
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise InvalidArgument(f"timeout_s is {timeout_s}, but must be a positive number of seconds.")
        self._address = address
        self._left = retries
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S

    def remaining_s(self) -> float | None:
        """Returns the time left for the next attempt; None means no limit."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_s(self, failure: grpc.RpcError, received: bool = False) -> float:
        """Returns the pause before the next attempt; raises the error of the failure if there is none."""
        error = error_of(failure, self._address, START)
        if isinstance(error, DeadlineExceeded):
            error = self.overdue()
        pause_s = self._choose_pause_s(error)
        remaining_s = self.remaining_s()
        if received or self._left < 1 or pause_s is None or (remaining_s is not None and pause_s >= remaining_s):
            raise error from None
        self._left -= 1
        return pause_s

    def overdue(self) -> DeadlineExceeded:
        """Returns the error of a call that exceeded its deadline."""
        limit = "its deadline" if self._timeout_s is None else f"{self._timeout_s:g} s"
        return DeadlineExceeded(
            f"The call to {self._address} did not end within {limit}; allow more time or request fewer tokens."
        )

    def _choose_pause_s(self, error: GptloopError) -> float | None:
        """Returns the pause before a retry, None for no retry; random, so that clients do not return all at once."""
        match error:
            case ResourceExhausted(retry_after_s=float(asked_s)) if asked_s <= _LONGEST_ASKED_S:
                return asked_s * random.uniform(1.0, 1.2)
            case Unavailable():
                pause_s = self._pause_s * random.uniform(0.5, 1.0)
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                return pause_s
            case _:
                return None
