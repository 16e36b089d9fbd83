"""Starts the ranks of an attempt, here or through a launcher, and ends all of them when one fails. Loads no MLX."""

import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

from shared.device.gpus import gpu_memories_bytes
from shared.device.machine import cpu_threads
from shared.errors import shown
from shared.service.listening import free_port_numbers
from shared.text import excerpt
from trainer_service.child_process import describe_end
from trainer_service.ranks.place import HOSTS_VARIABLE, INDEX_VARIABLE, PORT_VARIABLE, without_place

_TURN_S = 0.2
# How long ranks may finish their step and write after the worker has gone.
_ORPHAN_LIMIT_S = 8.0
# How long the other ranks may run after rank 0 has ended without an error.
_LAST_LIMIT_S = 10.0
_LONGEST_SENTENCE = 300


@dataclass(frozen=True)
class Command:
    """A program to start: how sentences call it, its arguments and its environment."""

    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


def commands(
    job: str,
    attempt: int,
    world_size: int,
    launcher: Sequence[str],
    environment: Mapping[str, str],
    gpus: Sequence[str],
) -> list[Command]:
    """Returns what to start: the launcher, if there is one, or else each rank on this machine.

    gpus: what names each GPU of this machine in `CUDA_VISIBLE_DEVICES`; each rank gets one if there are enough,
      otherwise the ranks compute on the CPU, whose cores they share.
    """
    program = [sys.executable, "-m", "trainer_service", "rank", job, str(attempt)]
    if launcher:
        words = [word.replace("{world_size}", str(world_size)) for word in launcher]
        return [Command("The launcher", [*words, *program], environment)]
    place = {HOSTS_VARIABLE: ",".join(["127.0.0.1"] * world_size), PORT_VARIABLE: str(free_port_numbers(world_size)[0])}
    threads = str(max(cpu_threads() // world_size, 1))
    has_gpus = len(gpus) >= world_size
    return [
        Command(
            f"Rank {rank}",
            program,
            without_place(environment)
            | place
            | {INDEX_VARIABLE: str(rank), "OMP_NUM_THREADS": threads}
            | ({"CUDA_VISIBLE_DEVICES": gpus[rank] if has_gpus else ""} if gpus else {}),
        )
        for rank in range(world_size)
    ]


def run_ranks(commands: Sequence[Command], stop_requested: Callable[[], bool], orphaned: Callable[[], bool]) -> str:
    """Runs all of them to their end, and returns a sentence about the first that failed, or an empty text.

    If one fails, the others are killed. A requested stop is passed on as SIGTERM; if the worker that started this
    process has gone, they are killed 8 s later.
    """
    with _Group() as group:
        try:
            for command in commands:
                group.start(command)
        except OSError as error:
            what = shown(commands[0].arguments[0])
            return f"{commands[0].name} {what} cannot be started: {error.strerror}"
        asked_s: float | None = None
        while group.running:
            group.take_turn()
            now_s = time.monotonic()
            if group.failure or group.first_ended_before(now_s - _LAST_LIMIT_S):
                break
            if asked_s is None and (stop_requested() or orphaned()):
                group.terminate()
                asked_s = now_s
            if asked_s is not None and orphaned() and now_s - asked_s > _ORPHAN_LIMIT_S:
                return "The worker was killed"
        return group.failure


@dataclass
class _Member:
    """A running program: the first line that it wrote to standard output, which is a sentence about its end, and the
    last one that it wrote to standard error."""

    name: str
    process: subprocess.Popen[bytes]
    sentence: bytes = b""
    last_line: bytes = b""
    ended_s: float | None = None
    unfinished: dict[int, bytes] = field(default_factory=dict)

    def read(self, stream: Any) -> bool:
        """Reads what there is, and passes standard error on line by line; returns False at its end."""
        some = os.read(stream.fileno(), 1 << 16)
        *lines, self.unfinished[stream.fileno()] = (self.unfinished.get(stream.fileno(), b"") + some).split(b"\n")
        if not some:
            lines = [self.unfinished.pop(stream.fileno())]
        for line in filter(None, lines):
            if stream is self.process.stdout:
                self.sentence = self.sentence or line
            else:
                os.write(2, line + b"\n")
                # mpirun draws lines around what it says.
                self.last_line = line if re.search(rb"\w", line) else self.last_line
        return bool(some)

    @property
    def failure(self) -> str:
        """A sentence about how it failed, without its full stop; empty if it has not."""
        if not self.process.returncode:
            return ""
        if self.sentence and self.process.returncode > 0:
            return f"{self.name}: {excerpt(self.sentence.decode(errors='replace'), _LONGEST_SENTENCE)}".rstrip(".")
        last = self.last_line.decode(errors="replace") if self.process.returncode > 0 else ""
        return f"{self.name} {describe_end(self.process.returncode, last)}".rstrip(".")


class _Group:
    """The programs of one attempt; leaving the context kills what is left of them.

    Each has a pipe as its standard output, so that a rank notices when this process is gone.
    """

    def __init__(self) -> None:
        self._members: list[_Member] = []
        self._selector = selectors.DefaultSelector()
        self.failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            # A launcher ends its ranks when it is asked to end.
            member.process.kill() if member.name.startswith("Rank") else member.process.terminate()
        for member in self._members:
            with suppress(subprocess.TimeoutExpired):
                member.process.wait(_LAST_LIMIT_S)
            member.process.kill()
            member.process.wait()
            for stream in (member.process.stdout, member.process.stderr):
                assert stream is not None
                stream.close()
        self._selector.close()

    def start(self, command: Command) -> None:
        process = subprocess.Popen(
            command.arguments,
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        member = _Member(command.name, process)
        self._members.append(member)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            self._selector.register(stream, selectors.EVENT_READ, member)

    @property
    def running(self) -> bool:
        return any(member.ended_s is None for member in self._members)

    def first_ended_before(self, time_s: float) -> bool:
        """Whether rank 0, or the launcher, ended before a time of the monotonic clock."""
        ended_s = self._members[0].ended_s
        return ended_s is not None and ended_s < time_s

    def terminate(self) -> None:
        for member in self._members:
            member.process.terminate()

    def take_turn(self) -> None:
        """Waits a moment for output, passes it on, and notices which programs have ended."""
        for key, _ in self._selector.select(_TURN_S):
            if not key.data.read(key.fileobj):
                self._selector.unregister(key.fileobj)
        if not self._selector.get_map():
            time.sleep(_TURN_S)
        ended = [member for member in self._members if member.ended_s is None and member.process.poll() is not None]
        for member in ended:
            member.ended_s = time.monotonic()
            self._drain(member)
        # The others fail because one was killed.
        ended.sort(key=lambda member: member.process.returncode)
        self.failure = self.failure or next((member.failure for member in ended if member.failure), "")

    def _drain(self, member: _Member) -> None:
        """Reads the last words of a program that has ended; its own children may keep its output open."""
        for stream in (member.process.stdout, member.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            with suppress(BlockingIOError):
                while member.read(stream):
                    pass
            with suppress(KeyError):
                self._selector.unregister(stream)


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns what names each NVIDIA GPU on which MLX computes here in `CUDA_VISIBLE_DEVICES`."""
    count = len(gpu_memories_bytes()) if sys.platform != "darwin" else 0
    names = environment.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return names[:count]
