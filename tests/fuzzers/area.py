"""What a fuzzer keeps: how many inputs it tried, and what fell."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc

PROJECT = Path(__file__).parents[2]
# A call that has not ended after this time hangs.

CALL_S = 20.0

BAD_CODES = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}


@dataclass
class Area:
    """An edge: how many inputs of each kind were tried, and what fell, each finding once."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        """All inputs that were tried."""
        return self.counts.total()

    def tried(self, kind: str = "") -> None:
        """Counts an input."""
        self.counts[kind] += 1

    def fell(self, what: str, given: object = "") -> None:
        """Keeps a finding."""
        if what not in self.findings:
            self.findings[what] = repr(given)[:2000]
            print(f"{self.name}: {what}\n    {repr(given)[:400]}", flush=True)


def read_lines(area: Area, lines: list[str]) -> None:
    """Keeps what a log says of a mistake, by the last line of its traceback."""
    for number, line in enumerate(lines):
        if line.startswith("Traceback") or "Exception ignored" in line:
            rest = "".join(lines[max(0, number - 2) : number + 60])
            last = next((each for each in lines[number + 1 : number + 90] if not each.startswith(" ")), "")
            area.fell(f"log: {last[:120]}", rest)


def resident_kib(pid: int) -> int:
    """Returns the memory of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * 4
