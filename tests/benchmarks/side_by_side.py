"""Measures several implementations of a task in turn, round by round, each in its own process.

So the changing speed of a shared machine affects all of them alike, and their thread pools and allocators stay apart.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Measured:
    """The seconds of a step in each round, and the peak memory in bytes.

    This is the resident memory on a CPU, and the memory that is allocated on the GPU otherwise.
    """

    rounds_s: tuple[float, ...]
    peak_bytes: int

    @property
    def step_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds_s)

    @property
    def spread(self) -> float:
        """The range of the rounds relative to their median."""
        return (max(self.rounds_s) - min(self.rounds_s)) / self.step_s


class Peer:
    """Controls an implementation in another process."""

    def __init__(self, task: str, name: str, specification: Mapping[str, object]) -> None:
        self.name = name
        command = [sys.executable, "-m", "tests.benchmarks.worker", task, name, json.dumps(specification)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, steps: int, least_s: float) -> dict[str, float]:
        """Takes `steps` steps, and more until `least_s` have passed; returns the seconds of a step and peak memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"steps": steps, "seconds": least_s}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self._process.wait()}.")
        answer: dict[str, float] = json.loads(line)
        return answer

    def end(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def measure(
    task: str,
    names: Sequence[str],
    specification: Mapping[str, object],
    *,
    rounds: int,
    steps: int,
    least_s: float = 0.0,
) -> dict[str, Measured]:
    """Measures each peer in turn, for `rounds` rounds after one that does not count. A round has `steps` steps, and
    more until `least_s` have passed."""
    peers = [Peer(task, name, specification) for name in names]
    try:
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(rounds + 1):
            for peer in peers:
                print(f"\r{peer.name}: round {number} of {rounds}      ", end="", file=sys.stderr, flush=True)
                answers[peer.name].append(peer.run(steps, least_s))
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
    finally:
        for peer in peers:
            peer.end()
    return {
        name: Measured(tuple(row["step_s"] for row in rows[1:]), int(rows[-1]["peak_bytes"]))
        for name, rows in answers.items()
    }


@dataclass(frozen=True)
class Task:
    """A measured step: its name, its tokens, the least seconds that it can take, and the measurements of each peer.
    Ratios are relative to the first peer."""

    name: str
    tokens: int
    floor_s: float
    peers: Mapping[str, Measured]


def print_results(tasks: Sequence[Task]) -> None:
    """Prints a table of the measurements."""
    rows = []
    for task in tasks:
        peers = task.peers
        first = next(iter(peers.values())).step_s
        for name, measured in peers.items():
            rows.append(
                [
                    task.name,
                    name,
                    f"{measured.step_s * 1e3:,.1f} ms",
                    f"{task.tokens / measured.step_s:,.0f}",
                    f"{first / measured.step_s:.2f}",
                    f"{task.floor_s / measured.step_s:.0%}",
                    f"{measured.spread:.0%}",
                    f"{measured.peak_bytes / 2**30:.2f} GiB",
                ]
            )
    print_table(["model", "implementation", "step", "tokens/s", "ratio", "of floor", "spread", "peak memory"], rows)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table, so that a page can show it unchanged."""
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    for number, row in enumerate((columns, *rows)):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |", flush=True)
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
