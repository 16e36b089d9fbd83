"""Shows a sweep to a person until it ends, and lets it do what is due."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

from rich.console import Console

from shared.errors import Unavailable
from shared.service.live_bar import LiveBar
from shared.text import printable
from trainer_service.follow import OUTAGE_S, PATIENCE_S
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.redis_client import Outage
from trainer_service.sweep.sweep import Sweep, Turn

_LOOK_S = 1.0


def follow(sweep: Sweep, queue: JobQueue, console: Console) -> Turn:
    """Does what is due until the sweep is over, and shows it; returns the last turn.

    Raises `Unavailable` if no worker is left, or if Redis does not answer for long, and the errors of `Sweep.turn`.
    """
    view, outage, without_worker = View(sweep), Outage(OUTAGE_S), Outage(PATIENCE_S)
    with LiveBar(console) if console.is_terminal else nullcontext() as bar:

        def show(line: str) -> None:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=bar is None)

        while True:
            try:
                turn, workers = sweep.turn(), queue.store.workers.count()
            except Unavailable as error:
                without_worker.end()
                if not outage.has_begun:
                    show(f"note: {error} The sweep goes on when Redis answers.")
                if not outage.may_retry():
                    raise
                time.sleep(_LOOK_S)
                continue
            outage.end()
            for line in view.changes(turn):
                show(line)
            if turn.is_over:
                return turn
            if bar:
                bar.show(view.fraction(turn), *view.facts(turn))
            if workers or any(job.is_held for job in turn.jobs):
                without_worker.end()
            elif not without_worker.may_retry():
                raise Unavailable("No worker is alive, so the candidates wait. Start one with `gptloop up`.")
            if not turn.decision.is_due:
                time.sleep(_LOOK_S)


class View:
    """Describes the turns of a sweep, each change once."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._shown: set[tuple[int, str]] = set()

    def changes(self, turn: Turn) -> Iterator[str]:
        """Yields a sentence for each candidate that has come to a rung or to its end, and one for a decision."""
        for number, job in enumerate(turn.jobs, start=1):
            text = self._describe(number, job)
            if text and (number, text) not in self._shown:
                self._shown.add((number, text))
                yield text
        decision = turn.decision
        if decision.is_due:
            goes = [f"going on to step {decision.until:,}: {_names(decision.go_on)}"] if decision.go_on else []
            stops = [f"stopped: {_names(decision.stop)}"] if decision.stop else []
            yield "; ".join(goes + stops)

    def _describe(self, number: int, job: JobRecord) -> str:
        name = f"candidate {number}"
        if job.state is JobState.FAILED:
            return f"{name} has failed: {job.reason}"
        if job.state is JobState.CANCELLED:
            return "" if job.reason else f"{name} was cancelled"
        measured = job.evaluation
        if measured and (job.is_suspended or job.state is JobState.FINISHED):
            values = self._sweep.members[number - 1].text
            return f"{name} ({values}): held-out loss {measured.validation_loss:.4f} at step {measured.step:,}"
        return ""

    def fraction(self, turn: Turn) -> float:
        """Returns the share of the steps that are done."""
        done = sum(job.progress.step for job in turn.jobs if job.progress)
        return min(done / self._sweep.halving.most_steps, 1.0)

    def facts(self, turn: Turn) -> list[str]:
        """Returns what happens now, the most important first."""
        working = [number for number, job in enumerate(turn.jobs, start=1) if job.is_held]
        left = [job for job in turn.jobs if not job.state.is_final]
        best = min((job.best.validation_loss for job in turn.jobs if job.best), default=None)
        facts = [f"{len(left)} of {len(turn.jobs)} candidates left"]
        if working:
            facts.append(f"at work: {_names(working)}")
        return facts if best is None else [*facts, f"best held-out {best:.3f}"]


def _names(numbers: Sequence[int]) -> str:
    """Returns `candidate 3` or `candidates 1 and 3`."""
    *first, last = map(str, numbers)
    return f"candidates {', '.join(first)} and {last}" if first else f"candidate {last}"
