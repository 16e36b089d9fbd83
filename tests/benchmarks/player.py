"""The process of one implementation in the open loop: plays the schedules from its standard input, one a line."""

import importlib
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Self

from shared.errors import Unavailable
from tests.benchmarks.recording import Recording
from tests.benchmarks.schedule import Schedule
from tests.benchmarks.setup import Setup
from tests.benchmarks.side_by_side import ROOT


class Player:
    """Controls an implementation in another process, in its own session, so that Ctrl-C does not reach it."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        command = [sys.executable, "-m", "tests.benchmarks.player", name, json.dumps(asdict(setup))]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        with suppress(BrokenPipeError):
            self._process.communicate()

    def play(self, schedule: Schedule) -> Recording:
        """Plays a schedule to the end of its last request; raises `Unavailable` if the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        # A process that has ended reads nothing; its missing answer is handled below.
        with suppress(BrokenPipeError):
            print(schedule.to_json(), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(f"{self.name} ended with exit code {self._process.wait()}; its output is above.")
        return Recording.from_json(line)


class Progress:
    """Shows the number of completed requests on a terminal, at most twice a second."""

    def __init__(self, name: str, requests: int) -> None:
        self._name, self._requests, self._ended = name, requests, 0
        self._shown_at = float("-inf")

    def ended(self) -> None:
        """Counts a request that has ended."""
        self._ended += 1
        now = time.monotonic()
        if sys.stderr.isatty() and (now - self._shown_at > 0.5 or self._ended == self._requests):
            self._shown_at = now
            print(f"\r{self._name}: {self._ended} of {self._requests} requests   ", end="", file=sys.stderr, flush=True)


def main() -> None:
    name, setup = sys.argv[1], Setup.from_dict(json.loads(sys.argv[2]))
    peer = importlib.import_module(f"tests.benchmarks.peers.{name.replace('-', '_')}").Serving(setup)
    for line in sys.stdin:
        schedule = Schedule.from_json(line)
        print(peer.play(schedule, Progress(name, len(schedule.arrivals))).to_json(), flush=True)


if __name__ == "__main__":
    main()
