"""The history of a run: a JSON line for each report and each evaluation, by ascending step.

The owner of the run appends to it. A run that resumes cuts it back to the step of its state. Readers
ignore lines that they cannot read, such as a last one that a killed process has not written completely.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from shared.errors import NotFound, shown
from shared.registry.commit import writing
from shared.registry.fence import Fence
from shared.registry.store import Store


@dataclass(frozen=True)
class ReportLine:
    """A report of training: means since the report before it; `loss` in nats per token, `time` since the epoch.

    `tokens` are those of the whole run, with those of the version that it continues. `attempt` is the attempt at the
    job that took the steps.
    """

    step: int
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    active_memory_bytes: int
    peak_memory_bytes: int
    resident_memory_bytes: int
    time: float
    attempt: int


@dataclass(frozen=True)
class EvaluationLine:
    """A held-out evaluation of a run, in nats per token; `version` was published with it, None if none was."""

    step: int
    tokens: int
    validation_loss: float
    bits_per_byte: float
    version: int | None
    time: float
    attempt: int


Line = ReportLine | EvaluationLine

_KINDS: dict[str, type[Line]] = {"report": ReportLine, "evaluation": EvaluationLine}
_NAMES = {kind: name for name, kind in _KINDS.items()}


@dataclass(frozen=True)
class History:
    """What a run has reported, each part by ascending step."""

    run: str
    reports: tuple[ReportLine, ...]
    evaluations: tuple[EvaluationLine, ...]

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines: the reports, then the evaluations."""
        return (*self.reports, *self.evaluations)


class Histories:
    """The histories of one registry."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ages_s(self) -> dict[str, float]:
        """Returns every run that has a history, in alphabetical order, and the seconds since its last line."""
        now, runs = time.time(), self._store.runs()
        return {run: now - at for run in sorted(runs) if (at := runs[run].history_written_at) is not None}

    def reader(self, run: str) -> "HistoryReader":
        """Returns a reader of the history of a run."""
        return HistoryReader(self._store, run)

    def writer(self, fence: Fence, step: int, published: EvaluationLine | None = None) -> "HistoryWriter":
        """Returns a writer that continues the history of a run after a step."""
        return HistoryWriter(self._store, fence, step, published)

    def read(self, run: str) -> History:
        """Reads the history of a run; raises `NotFound`, which names the runs that have one."""
        runs = list(self.ages_s())
        if run not in runs:
            others = f"these runs have one: {', '.join(runs)}" if runs else "no run has one yet"
            raise NotFound(f"There is no history of a run named {shown(run)}; {others}.")
        lines = [line for line, _ in _lines(self._store.read_history(run)) if line is not None]
        return History(
            run,
            tuple(line for line in lines if isinstance(line, ReportLine)),
            tuple(line for line in lines if isinstance(line, EvaluationLine)),
        )

    def remove(self, run: str) -> None:
        """Removes the history of a run."""
        self._store.remove_history(run)


class HistoryReader:
    """Reads a history again and again, each time only the lines that are new."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._run = run
        # The end of the lines that were read, and the last of them.
        self._end = 0
        self._last = b""

    def read(self) -> tuple[list[Line], bool]:
        """Returns the lines since the last call, and whether they replace all earlier ones, as the run was cut back.

        Raises `FileNotFoundError` if there is no history any more.
        """
        content = self._store.read_history(self._run, self._end - len(self._last))
        # A line contains the time, so that one that is written again differs.
        is_cut = not content.startswith(self._last)
        if is_cut:
            self._end, self._last = 0, b""
            content = self._store.read_history(self._run)
        content = content[len(self._last) :]
        lines = []
        begin = 0
        for line, end in _lines(content):
            self._last, begin = content[begin:end], end
            if line is not None:
                lines.append(line)
        self._end += begin
        return lines, is_cut


class HistoryWriter:
    """Continues the history of a run after a step, on behalf of the run's owner.

    published: the evaluation of this step, if its version is published; the process that published it may have died
      before it wrote the line.

    Raises `FailedPrecondition` if the store fails, which costs the line, and `RunOwnershipLost` if another process took
    over the run. Later lines are removed before the first line is written; until that succeeds, none is.
    """

    def __init__(self, store: Store, fence: Fence, step: int, published: EvaluationLine | None) -> None:
        self._store = store
        self._fence = fence
        self._step = step
        self._published = published
        self._is_cut = False
        # Whether a write that failed may have left the beginning of a line.
        self._is_torn = False

    def append(self, *lines: Line, synced: bool = False) -> None:
        """Appends lines with one write; `synced` makes sure that no failure costs them or any earlier one."""
        with writing(self._store.address):
            if not self._is_cut:
                self._cut()
                self._is_cut = True
            if lines or synced:
                self._write(lines, synced)

    def _cut(self) -> None:
        """Removes the lines after the step; they are the last ones, so this needs no space on a disk."""
        kept_bytes, has_published = 0, False
        try:
            content = self._store.read_history(self._fence.run)
        except FileNotFoundError:
            content = b""
        for line, end in _lines(content):
            if line is None:
                continue
            if line.step > self._step or self._is_repeated(line):
                break
            kept_bytes = end
            has_published = isinstance(line, EvaluationLine) and line.step == self._step
        if kept_bytes < len(content):
            self._store.cut_history(self._fence, kept_bytes)
        if self._published and not has_published:
            self._write([self._published], synced=False)

    def _is_repeated(self, line: Line) -> bool:
        """Whether the line is an evaluation of the step itself that has no version, and so takes place again."""
        if not isinstance(line, EvaluationLine) or line.step < self._step:
            return False
        return self._published is None or self._published.version != line.version

    def _write(self, lines: Sequence[Line], synced: bool) -> None:
        values = ({"kind": _NAMES[type(line)], **asdict(line)} for line in lines)
        text = "".join(json.dumps(each, allow_nan=False) + "\n" for each in values)
        was_torn, self._is_torn = self._is_torn, bool(text) or self._is_torn
        self._store.append_history(self._fence, f"\n{text}".encode() if was_torn and text else text.encode(), synced)
        self._is_torn = was_torn and not text


def _lines(content: bytes) -> Iterator[tuple[Line | None, int]]:
    """Yields each complete line and the position of its end; None for a line that cannot be read."""
    end = 0
    for text in content.splitlines(keepends=True):
        end += len(text)
        if text.endswith(b"\n"):
            yield _line(text), end


def _line(text: bytes) -> Line | None:
    try:
        values = json.loads(text)
        kind = _KINDS[values["kind"]]
        return kind(**{each.name: _typed(values[each.name], each.type) for each in fields(kind)})
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _typed(value: Any, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
        raise TypeError
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise OverflowError
    return value
