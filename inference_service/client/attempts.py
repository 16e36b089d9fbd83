"""When a call is made again, and what its failure means to the caller."""

import math
import random
import time

import grpc

from inference_service.client.channel import START_ADVICE
from shared.errors import DeadlineExceeded, GptloopError, InvalidArgument, ResourceExhausted, Unavailable
from shared.service.grpc_status import error_of

# Longer than the channel waits between two attempts to connect, for a call that comes earlier fails unsent.
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
# A server that asks for more patience than that is the caller's affair.
_LONGEST_ASKED_S = 60.0


class Attempts:
    """The attempts at one call: at most `retries` after the first, all of them before the deadline.

    Another one follows where a server cannot be reached or refuses, `Unavailable`, or is full and says when to come
    again, `ResourceExhausted` with `retry_after_s`, and only while nothing of an answer was received. No call changes
    anything on the server, so what an attempt may have begun there is lost without harm.

    `timeout_s` is for the whole call from now on, None for no limit; raises `InvalidArgument` where it is no time.
    """

    def __init__(self, address: str, retries: int, timeout_s: float | None) -> None:
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise InvalidArgument(f"timeout_s is {timeout_s}, but must be a number of seconds above 0.")
        self._address = address
        self._left = retries
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._pause_s = _FIRST_PAUSE_S

    def remaining_s(self) -> float | None:
        """How long the next attempt may take."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def pause_s(self, failure: grpc.RpcError, received: bool = False) -> float:
        """How long to wait before the next attempt; raises what the failure means where none may follow."""
        error = error_of(failure, self._address, START_ADVICE)
        if isinstance(error, DeadlineExceeded):
            error = self.overdue()
        pause_s = self._choose_pause_s(error)
        remaining_s = self.remaining_s()
        if received or self._left < 1 or pause_s is None or (remaining_s is not None and pause_s >= remaining_s):
            raise error from None
        self._left -= 1
        return pause_s

    def overdue(self) -> DeadlineExceeded:
        """The error of a call that was cut by its deadline."""
        limit = "its deadline" if self._timeout_s is None else f"{self._timeout_s:g} s"
        return DeadlineExceeded(
            f"The call to {self._address} did not end within {limit}: give it more time, or ask for fewer tokens."
        )

    def _choose_pause_s(self, error: GptloopError) -> float | None:
        """The pause that an error calls for, a little random, so that clients do not come back all at once."""
        match error:
            case ResourceExhausted(retry_after_s=float(asked_s)) if asked_s <= _LONGEST_ASKED_S:
                return asked_s * random.uniform(1.0, 1.2)
            case Unavailable():
                pause_s = self._pause_s * random.uniform(0.5, 1.0)
                self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
                return pause_s
            case _:
                return None
