"""The histories of runs as columns, which grow with the runs: what the page draws."""

import math
import re
import secrets
import threading
import time
from array import array
from dataclasses import dataclass, fields
from typing import Any

from shared.errors import NotFound, shown
from shared.registry.history import EvaluationLine, Histories, HistoryReader, Line, ReportLine

# The run as it was first read, its reports and its evaluations that a reader knows.
_CURSOR = re.compile(r"([0-9a-f]+)\.([0-9]{1,18})\.([0-9]{1,18})")


# The clocks of machines may differ by this much, and the times of files are coarse.
_SETTLED_S = 60.0


@dataclass(frozen=True)
class Last:
    """The end of a run's history; `time` is that of the last line, in seconds since the epoch."""

    run: str
    cursor: str
    age_s: float
    step: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    bits_per_byte: float | None
    tokens_per_second: float | None


class _Columns:
    """Lines of one kind, a column for each field.

    Arrays of numbers, because garbage collection would go through objects again and again, and delay streams.
    """

    def __init__(self, kind: type[Line]) -> None:
        self.columns = {each.name: _empty(each.type is float) for each in fields(kind)}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, line: Line) -> None:
        """Adds a line; 0 stands for the version of an evaluation that has none."""
        for name, column in self.columns.items():
            column.append(getattr(line, name) or 0)

    def last(self, name: str) -> Any:
        """Returns the last value of a column, None if there is none."""
        return self.columns[name][-1] if len(self) else None

    def since(self, count: int) -> dict[str, list[float]]:
        """Returns the lines after the first `count`."""
        return {name: column[count:].tolist() for name, column in self.columns.items()}


def _empty(has_fractions: bool) -> "array[Any]":
    return array("d" if has_fractions else "q")


class _Curve:
    """The history of one run. The cursor says which lines a reader knows."""

    def __init__(self, reader: HistoryReader) -> None:
        self._reader = reader
        # When it was read last, on the monotonic clock.
        self.read_s = -math.inf
        self._clear()

    def _clear(self) -> None:
        self._id = secrets.token_hex(4)
        self.reports, self.evaluations = _Columns(ReportLine), _Columns(EvaluationLine)

    @property
    def cursor(self) -> str:
        return f"{self._id}.{len(self.reports)}.{len(self.evaluations)}"

    def read(self) -> None:
        lines, is_cut = self._reader.read()
        if is_cut:
            self._clear()
        for line in lines:
            (self.reports if isinstance(line, ReportLine) else self.evaluations).add(line)

    def since(self, cursor: str) -> dict[str, Any]:
        match = _CURSOR.fullmatch(cursor)
        continues = match is not None and match[1] == self._id
        reports, evaluations = (int(match[2]), int(match[3])) if match and continues else (0, 0)
        return {
            "cursor": self.cursor,
            "continues": continues,
            "reports": self.reports.since(reports),
            "evaluations": self.evaluations.since(evaluations),
        }


class Curves:
    """Reads the histories of a registry, each line once. Any thread may call it."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        self._curves: dict[str, _Curve] = {}
        self._lock = threading.Lock()

    def lasts(self) -> list[Last]:
        """Returns the end of each history, the one that was written last first."""
        with self._lock:
            ages_s = self._histories.ages_s()
            self._curves = {run: curve for run, curve in self._curves.items() if run in ages_s}
            lasts = [
                self._last(run, age_s, curve)
                for run, age_s in ages_s.items()
                if (curve := self._read(run, age_s)) is not None
            ]
        return sorted(lasts, key=lambda last: last.age_s)

    def since(self, run: str, cursor: str) -> dict[str, Any]:
        """Returns the lines of a run after those that a cursor says are known, as columns, with the next cursor.

        Returns all lines, with `continues` false, if the cursor is empty or the run was cut back. Raises `NotFound`.
        """
        with self._lock:
            age_s = self._histories.ages_s().get(run)
            curve = None if age_s is None else self._read(run, age_s)
            if curve is None:
                raise NotFound(f"There is no history of a run named {shown(run)}.")
            return curve.since(cursor)

    def _read(self, run: str, age_s: float) -> _Curve | None:
        curve = self._curves.get(run) or _Curve(self._histories.reader(run))
        now_s = time.monotonic()
        if now_s - age_s < curve.read_s - _SETTLED_S:
            return curve  # nothing has been written since
        try:
            curve.read()
            curve.read_s = now_s
        except FileNotFoundError:
            self._curves.pop(run, None)
            return None
        self._curves[run] = curve
        return curve

    def _last(self, run: str, age_s: float, curve: _Curve) -> Last:
        reports, evaluations = curve.reports, curve.evaluations
        return Last(
            run=run,
            cursor=curve.cursor,
            age_s=max(age_s, 0.0),
            step=max(reports.last("step") or 0, evaluations.last("step") or 0),
            tokens=max(reports.last("tokens") or 0, evaluations.last("tokens") or 0),
            loss=reports.last("loss"),
            validation_loss=evaluations.last("validation_loss"),
            bits_per_byte=evaluations.last("bits_per_byte"),
            tokens_per_second=reports.last("tokens_per_second"),
        )
