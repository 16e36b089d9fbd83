"""The history of a run: `runs/<run>/history.jsonl`, a JSON line for each report and each evaluation, by ascending step.

The owner of the run appends to it, one write a line. A run that resumes cuts it back to the step of its state. Readers
ignore lines that they cannot read, such as a last one that a killed process has not written completely.
"""

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from shared.errors import NotFound, shown
from shared.registry.commit import sync, writing
from shared.registry.fence import Fence
from shared.registry.manifest import RUN_NAME
from shared.registry.numbering import children

_NAME = "history.jsonl"


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
    """The histories of one registry, for readers."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def runs(self) -> list[str]:
        """Returns every run that has a history, in alphabetical order."""
        found = (path for path in children(self._root / "runs") if RUN_NAME.fullmatch(path.name))
        return sorted(path.name for path in found if (path / _NAME).is_file())

    def reader(self, run: str) -> "HistoryReader":
        """Returns a reader of the history of a run."""
        return HistoryReader(self._root / "runs" / run / _NAME)

    def read(self, run: str) -> History:
        """Reads the history of a run; raises `NotFound`, which names the runs that have one."""
        runs = self.runs()
        if run not in runs:
            others = f"these runs have one: {', '.join(runs)}" if runs else "no run has one yet"
            raise NotFound(f"There is no history of a run named {shown(run)}; {others}.")
        lines = [line for line, _ in _lines((self._root / "runs" / run / _NAME).read_bytes()) if line is not None]
        return History(
            run,
            tuple(line for line in lines if isinstance(line, ReportLine)),
            tuple(line for line in lines if isinstance(line, EvaluationLine)),
        )

    def age_s(self, run: str) -> float:
        """Returns the seconds since the last line was written; 0 if there is no history."""
        try:
            return time.time() - (self._root / "runs" / run / _NAME).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def remove(self, run: str) -> None:
        """Removes the history of a run."""
        (self._root / "runs" / run / _NAME).unlink(missing_ok=True)


class HistoryReader:
    """Reads a history again and again, each time only the lines that are new."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The end of the lines that were read, and the last of them.
        self._end = 0
        self._last = b""

    def read(self) -> tuple[list[Line], bool]:
        """Returns the lines since the last call, and whether they replace all earlier ones, as the run was cut back.

        Raises `FileNotFoundError` if there is no history any more.
        """
        with self._path.open("rb") as file:
            file.seek(self._end - len(self._last))
            content = file.read()
            # A line contains the time, so that one that is written again differs.
            is_cut = not content.startswith(self._last)
            if is_cut:
                file.seek(0)
                self._end, self._last = 0, b""
                content = file.read()
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

    Raises `FailedPrecondition` if the disk fails, which costs the line, and `RunOwnershipLost` if another process took
    over the run. Later lines are removed before the first line is written; until that succeeds, none is.
    """

    def __init__(self, fence: Fence, step: int, published: EvaluationLine | None = None) -> None:
        self._fence = fence
        self._path = fence.directory / _NAME
        self._step = step
        self._published = published
        self._is_cut = False

    def append(self, *lines: Line, synced: bool = False) -> None:
        """Appends lines, each with one write; `synced` forces them and all earlier ones to the disk."""
        with writing(self._fence.directory.parents[1]), self._fence.held():
            if not self._is_cut:
                self._cut()
                self._is_cut = True
            for line in lines:
                self._write(line)
            if synced and self._path.exists():
                sync(self._path)
                sync(self._path.parent)

    def _cut(self) -> None:
        """Removes the lines after the step; they are the last ones, so this needs no space on the disk."""
        kept_bytes, has_published = 0, False
        if self._path.exists():
            for line, end in _lines(self._path.read_bytes()):
                if line is None:
                    continue
                if line.step > self._step or self._is_repeated(line):
                    break
                kept_bytes = end
                has_published = isinstance(line, EvaluationLine) and line.step == self._step
            if kept_bytes < self._path.stat().st_size:
                with self._path.open("r+b", buffering=0) as file:
                    file.truncate(kept_bytes)
        if self._published and not has_published:
            self._write(self._published)

    def _is_repeated(self, line: Line) -> bool:
        """Whether the line is an evaluation of the step itself that has no version, and so takes place again."""
        if not isinstance(line, EvaluationLine) or line.step < self._step:
            return False
        return self._published is None or self._published.version != line.version

    def _write(self, line: Line) -> None:
        text = json.dumps({"kind": _NAMES[type(line)], **asdict(line)}, allow_nan=False) + "\n"
        with self._path.open("a+b", buffering=0) as file:
            # A write that failed may have left the beginning of a line.
            if size_bytes := file.seek(0, os.SEEK_END):
                file.seek(size_bytes - 1)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            content = text.encode()
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


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
