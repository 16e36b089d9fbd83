"""Waits until every rank of a run is there, before MLX connects them: MLX waits for 15 s at most, or for ever.

Rank 0 listens; each other rank connects and says which job it works on. When all have come, each gets the addresses of
all. Neither this nor MLX's ring knows whom it speaks with, so ranks need a private network.
"""

import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Container
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from shared.errors import FailedPrecondition, Unavailable, shown
from trainer_service.jobs.attempt import Stopped
from trainer_service.ranks.place import Place
from trainer_service.ranks.watchdog import EXIT_CODE

logger = logging.getLogger(__name__)

LIMIT_S = 600.0
_POLL_S = 0.2
_DISMISSAL_S = 60.0
_MESSAGE_S = 5.0
_LONGEST_MESSAGE = 1 << 17
# Rank 0 listens for MLX after this; a rank that connects earlier waits for a second before it tries again.
_HEAD_START_S = 0.2


class Dismissed(Stopped):
    """Rank 0 does not need this rank, which ends with an exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


@dataclass(frozen=True)
class Meeting:
    """The meeting of the ranks of an attempt; `attempt` is None if only rank 0 knows it.

    Both methods return `host:port` of each rank, in their order. They call `tick` several times a second, with the
    number of ranks that are there, and pass on what it raises. They raise `Unavailable` if ranks are missing for too
    long, `FailedPrecondition` if this rank belongs elsewhere, and `Dismissed` if rank 0 has ended.
    """

    place: Place
    job: str
    attempt: int | None
    limit_s: float = LIMIT_S

    def hold(self, tick: Callable[[int], object]) -> list[str]:
        """Waits, as rank 0, for the others."""
        deadline_s = time.monotonic() + self.limit_s
        with ExitStack() as stack:
            listener = stack.enter_context(self._listen())
            present: dict[int, socket.socket] = {}
            try:
                while len(present) + 1 < self.place.count:
                    tick(len(present) + 1)
                    self._check_time(deadline_s, present)
                    with suppress(TimeoutError):
                        connection = stack.enter_context(listener.accept()[0])
                        if (rank := self._admit(connection)) is not None:
                            present[rank] = connection
            except Exception:
                for connection in present.values():
                    with suppress(OSError):
                        _dismiss(connection, "Rank 0 has ended before all ranks were there.", EXIT_CODE)
                raise
            # Before anybody connects through MLX to the same port.
            listener.close()
            own = present[1].getsockname()[0]
            hosts = [own, *(present[rank].getpeername()[0] for rank in range(1, self.place.count))]
            addresses = _with_ports(hosts, self._port)
            for rank, connection in present.items():
                try:
                    _send(connection, {"addresses": addresses})
                    # The other side closes first, so that the port is free at once.
                    connection.recv(1)
                except OSError as error:
                    raise Unavailable(f"Rank {rank} has gone: {shown(error)}.") from error
        return addresses

    def dismiss(self, sentence: str, code: int) -> None:
        """Sends the others home, as rank 0, if there is nothing to do; waits for them a minute at most."""
        deadline_s, told = time.monotonic() + _DISMISSAL_S, set[int]()
        with self._listen() as listener:
            while len(told) + 1 < self.place.count and time.monotonic() < deadline_s:
                with suppress(TimeoutError), listener.accept()[0] as connection:
                    if (rank := self._admit(connection)) is not None:
                        _dismiss(connection, sentence, code)
                        told.add(rank)

    def attend(self, tick: Callable[[int], object]) -> list[str]:
        """Comes, as another rank, to the meeting."""
        deadline_s, why = time.monotonic() + self.limit_s, ""
        while time.monotonic() < deadline_s:
            tick(1)
            try:
                with socket.create_connection(self._address, timeout=_MESSAGE_S) as connection:
                    hello = {"job": self.job, "attempt": self.attempt, "rank": self.place.rank}
                    _send(connection, {**hello, "count": self.place.count})
                    answer = _receive(connection, lambda: tick(2), deadline_s)
            except (OSError, ValueError) as error:
                why = shown(error)
                time.sleep(_POLL_S)
                continue
            if "over" in answer:
                logger.warning("%s", answer["over"])
                raise Dismissed(answer["code"])
            if "error" in answer:
                raise FailedPrecondition(answer["error"])
            time.sleep(_HEAD_START_S)
            return [str(address) for address in answer["addresses"]]
        host, port = self._address
        raise Unavailable(f"Rank 0 did not answer at {host}:{port} within {self.limit_s:.0f} s: {why}.")

    @property
    def _address(self) -> tuple[str, int]:
        assert self.place.meeting is not None, "Ranks that MPI joins do not meet."
        return self.place.meeting

    @property
    def _port(self) -> int:
        return self._address[1]

    def _listen(self) -> socket.socket:
        # The own name of a machine may stand for its loopback address there, but not elsewhere.
        host = "127.0.0.1" if self._address[0] in ("127.0.0.1", "localhost") else "0.0.0.0"
        try:
            listener = socket.create_server((host, self._port), backlog=self.place.count)
        except OSError as error:
            raise Unavailable(f"Rank 0 cannot listen at {host}:{self._port}: {error.strerror}.") from error
        listener.settimeout(_POLL_S)
        return listener

    def _check_time(self, deadline_s: float, present: Container[int]) -> None:
        if time.monotonic() > deadline_s:
            missing = [str(rank) for rank in range(1, self.place.count) if rank not in present]
            who = f"Rank {missing[0]} has" if len(missing) == 1 else f"Ranks {', '.join(missing)} have"
            raise Unavailable(f"{who} not come within {self.limit_s:.0f} s.")

    def _admit(self, connection: socket.socket) -> int | None:
        """Returns the rank that a connection comes from, or None if it is no rank of this attempt."""
        connection.settimeout(_MESSAGE_S)
        try:
            hello = _receive(connection, lambda: None, time.monotonic() + _MESSAGE_S)
            rank, count, job, attempt = (hello[name] for name in ("rank", "count", "job", "attempt"))
            is_other = (job, count) != (self.job, self.place.count)
            if is_other or (None not in (attempt, self.attempt) and attempt != self.attempt):
                other = f"rank {rank} of {count} of job {job}" + (f", attempt {attempt}" if attempt else "")
                own = f"rank 0 of {self.place.count} of job {self.job}, attempt {self.attempt}"
                _send(connection, {"error": f"This is {other}, but it met {own}."})
                logger.warning("refused %s", shown(other))
                return None
            return rank if isinstance(rank, int) and 0 < rank < self.place.count else None
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("a connection that is no rank was closed: %s", shown(error))
            return None


def _with_ports(hosts: list[str], port: int) -> list[str]:
    """Returns an address for each rank: ranks on one host take ports that follow one another."""
    seen: Counter[str] = Counter()
    addresses = []
    for host in hosts:
        addresses.append(f"{host}:{port + seen[host]}")
        seen[host] += 1
    return addresses


def _dismiss(connection: socket.socket, sentence: str, code: int) -> None:
    _send(connection, {"over": sentence, "code": code})


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, tick: Callable[[], object], deadline_s: float) -> dict[str, Any]:
    """Returns the next message; raises `OSError` or `ValueError` if none comes."""
    connection.settimeout(_POLL_S)
    received = b""
    while not received.endswith(b"\n"):
        tick()
        if time.monotonic() > deadline_s:
            raise TimeoutError("no answer came in time")
        with suppress(TimeoutError):
            some = connection.recv(4096)
            if not some:
                raise ConnectionError("the connection was closed")
            received += some
        if len(received) > _LONGEST_MESSAGE:
            raise ValueError("the message is too long")
    message = json.loads(received)
    if not isinstance(message, dict):
        raise ValueError("the message is no object")
    return message
