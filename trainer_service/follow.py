"""Shows the events of a job to a user: with a live bar on a terminal, as plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import nullcontext

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from shared.errors import GptloopError, Unavailable
from shared.service.live_bar import LiveBar
from shared.text import format_duration, printable
from trainer_service.jobs import events
from trainer_service.jobs.events import Event, JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.loss_curve import Point, draw
from trainer_service.redis_client import Outage

_WAIT_S = 1.0
# How long a job may have neither a process nor a live worker.
PATIENCE_S = 20.0
# How long Redis may not answer: training continues meanwhile, and its events arrive afterwards.
OUTAGE_S = 600.0

_WAITING = "waiting for a worker"

# Lines of the curve, and of a terminal that has room for it.
_CURVE_LINES = 10
_ROOM_LINES = 20


def follow(queue: JobQueue, job_id: str, console: Console) -> None:
    """Shows every event of a job until it ends, on a terminal with a curve, and continues after an outage of Redis.

    Raises `GptloopError` with the reason if the job fails, and `Unavailable` if no worker is left to continue it.
    """
    curve = _Curve()
    try:
        with LiveBar(console, (_WAITING,), above=curve) if console.is_terminal else nullcontext() as bar:
            view = _View(console, bar)
            for event in _until_end(queue, job_id):
                curve.add(event)
                view.show(event)
                if isinstance(event, events.StateChanged) and event.state is JobState.FAILED:
                    raise GptloopError(f"The job {job_id} failed: {event.reason}")
    finally:
        if console.is_terminal:
            console.print(curve)


def _until_end(queue: JobQueue, job_id: str) -> Iterator[Event]:
    """Yields the events of a job, and a preparation whenever what it waits for changes."""
    last, outage, without_worker, shown = "0", Outage(OUTAGE_S), Outage(PATIENCE_S), ""
    while True:
        try:
            batch = queue.store.read_events(job_id, last, _WAIT_S)
            record, workers = queue.store.get(job_id), queue.store.workers.count()
        except Unavailable as error:
            without_worker.end()
            if not outage.has_begun:
                yield events.Notice(f"{error} The job may continue; its events follow when Redis answers.")
            if not outage.may_retry():
                raise Unavailable(f"{error} Follow the job again with `gptloop watch {job_id}`.") from error
            time.sleep(_WAIT_S)
            continue
        if outage.has_begun:
            yield events.Notice("Redis answers again.")
            outage.end()
        for event_id, timed in batch:
            last = event_id
            yield timed.event
            if isinstance(timed.event, events.StateChanged) and timed.event.state.is_final:
                return
        if record.state is JobState.QUEUED and shown != (wait := _describe_wait(record)):
            shown = wait
            yield events.Preparation(wait)
        if record.is_held or workers:
            without_worker.end()
        elif not without_worker.may_retry():
            raise Unavailable(
                f"No worker is alive, so the job {job_id} waits. Start one with `gptloop up`; "
                "it resumes from its last state."
            )


def describe(event: Event) -> str | None:
    """Describes an event in one line; returns None for an event that only a live view shows."""
    match event:
        case events.StateChanged(JobState.FAILED) | events.Preparation():
            return None
        case events.StateChanged(state, reason):
            return f"{state.value}. {reason}".strip()
        case events.RunStarted() as started:
            position = f"step {started.first_step} to {started.max_steps}"
            return (
                f"{started.parameters:,} parameters ({started.embedding_parameters:,} in embeddings) "
                f"on {started.device}; "
                f"{started.train_tokens:,} training and {started.validation_tokens:,} held-out tokens "
                f"({started.tokenizer}); {position}"
            )
        case events.Progress() as progress:
            return "  ".join(_facts(progress))
        case events.Evaluation() as evaluation:
            held_out = (
                f"held-out loss {evaluation.validation_loss:.4f} nats per token, "
                f"{evaluation.bits_per_byte:.4f} bits per byte"
            )
            if evaluation.version is not None:
                return (
                    f"version {evaluation.version}: {held_out}, on {evaluation.windows:,} windows of {evaluation.text}"
                )
            return f"step {evaluation.step}: {held_out} (training loss {evaluation.training_loss:.4f})"
        case events.VersionPublished() as published:
            return f"version {published.version} published" + (", the best so far" if published.best else "")
        case events.Notice(text):
            return f"note: {text}"


def describe_job(record: JobRecord) -> str:
    """Describes the state of a job in a few words."""
    words = [record.reason] if record.reason else []
    if record.state is JobState.QUEUED:
        if record.after and record.started_at is None:
            words.append("after " + ", ".join(record.after))
        if record.awaited:
            words.append(f"waits for {record.awaited}")
        if record.ahead:
            words.append(describe_ahead(record.ahead))
    if words:
        return "; ".join(words)
    if progress := record.progress:
        return f"step {progress.step}/{progress.max_steps}, loss {progress.loss:.3f}"
    if record.evaluation:
        return f"held-out loss {record.evaluation.validation_loss:.4f}"
    return record.preparation.stage if record.preparation and not record.state.is_final else ""


def _describe_wait(record: JobRecord) -> str:
    """Describes what a queued job waits for; `_WAITING` if that is the next free worker."""
    if record.is_suspended:
        return "waiting for its sweep"
    wait = f"waiting for {record.awaited}, and none is alive" if record.awaited else _WAITING
    return f"{wait}: {describe_ahead(record.ahead)}" if record.ahead else wait


def describe_ahead(ahead: int) -> str:
    """Describes how many jobs come first."""
    return "1 job comes first" if ahead == 1 else f"{ahead:,} jobs come first"


class _Curve:
    """The losses of the run, drawn when they or the terminal have changed."""

    def __init__(self) -> None:
        self._training: list[Point] = []
        self._held_out: list[Point] = []
        self._drawn: tuple[tuple[int, bool], list[str]] | None = None

    def add(self, event: Event) -> None:
        """Adds the loss of an event, if it has one."""
        match event:
            case events.RunStarted(first_step=first_step):
                # Another attempt takes the steps after its state again.
                for points in (self._training, self._held_out):
                    points[:] = [each for each in points if each.step < first_step]
            case events.Progress(step=step, loss=loss):
                self._training.append(Point(step, loss))
            case events.Evaluation(step=step, validation_loss=loss, version=None):
                self._held_out.append(Point(step, loss))
            case _:
                return
        self._drawn = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.height < _ROOM_LINES:
            return
        form = options.max_width - 1, not options.ascii_only
        if self._drawn is None or self._drawn[0] != form:
            width, is_unicode = form
            self._drawn = form, draw(self._training, self._held_out, width, _CURVE_LINES, is_unicode)
        for line in self._drawn[1]:
            yield Text(line, no_wrap=True, overflow="crop")


class _View:
    """Prints a line for each event; on a terminal, a bar shows the preparation and the progress instead."""

    def __init__(self, console: Console, bar: LiveBar | None) -> None:
        self._console = console
        self._bar = bar
        self._stage = _WAITING

    def show(self, event: Event) -> None:
        line = describe(event)
        match event:
            case events.Preparation(stage, fraction):
                if self._bar:
                    self._bar.show(fraction, stage)
                elif stage not in (_WAITING, self._stage):
                    self._stage = line = stage
            case events.Progress() as progress if self._bar:
                self._bar.show(progress.step / progress.max_steps, *_facts(progress))
                return
        if line:
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=self._bar is None)


def _facts(progress: events.Progress) -> list[str]:
    """Returns the progress in phrases, the most important first."""
    facts = [f"step {progress.step}/{progress.max_steps}", f"loss {progress.loss:.3f}"]
    if progress.eta_s is None:
        facts.append("speed not yet known")
    else:
        facts += [f"ETA {format_duration(progress.eta_s)}", f"{progress.tokens_per_second:,.0f} tokens/s"]
    if progress.best_validation_loss:
        facts.append(f"best held-out {progress.best_validation_loss:.3f}")
    return [*facts, f"lr {progress.learning_rate:.2e}"]
