"""Shows the events of a job to a user: with a live bar on a terminal, as plain lines elsewhere."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from shared.errors import GptloopError, Unavailable
from shared.service.live_bar import LiveBar
from shared.text import format_duration, printable
from trainer_service.jobs import events
from trainer_service.jobs.events import Event, JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.reachable import Outage
from trainer_service.jobs.records import JobRecord

_WAIT_S = 1.0
# How long a job may have neither a process nor a live worker.
_PATIENCE_S = 20.0
# How long Redis may not answer: training continues meanwhile, and its events arrive afterwards.
_OUTAGE_S = 600.0


@dataclass(frozen=True)
class Waiting:
    """The job waits for a worker; `ahead` other jobs come before it."""

    ahead: int

    def __str__(self) -> str:
        if not self.ahead:
            return "waiting for a worker"
        return f"waiting for a worker: {describe_ahead(self.ahead)}"


def follow(queue: JobQueue, job_id: str, console: Console) -> None:
    """Shows every event of a job until it ends, and continues after an outage of Redis.

    Raises `GptloopError` with the reason if the job fails, and `Unavailable` if no worker is left to continue it.
    """
    view = _LiveView(console) if console.is_terminal else _PlainView(console)
    with view:
        for event in _until_end(queue, job_id):
            if isinstance(event, Waiting):
                view.wait(event)
                continue
            view.show(event)
            if isinstance(event, events.StateChanged) and event.state is JobState.FAILED:
                raise GptloopError(f"The job {job_id} failed: {event.reason}")


def _until_end(queue: JobQueue, job_id: str) -> Iterator[Event | Waiting]:
    last, abandoned_since_s, outage, waiting = "0", None, Outage(_OUTAGE_S), None
    while True:
        try:
            batch = queue.store.read_events(job_id, last, _WAIT_S)
            record, workers = queue.store.get(job_id), queue.leases.live_workers()
        except Unavailable as error:
            abandoned_since_s = None
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
        if record.ahead is not None and waiting != Waiting(record.ahead):
            waiting = Waiting(record.ahead)
            yield waiting
        if record.is_held or workers:
            abandoned_since_s = None
        elif abandoned_since_s is None:
            abandoned_since_s = time.monotonic()
        elif time.monotonic() - abandoned_since_s > _PATIENCE_S:
            raise Unavailable(
                f"No worker is alive, so the job {job_id} waits. Start one with `gptloop up`; "
                "it resumes from its last state."
            )


def describe(event: Event) -> str | None:
    """Describes an event in one line; returns None for an event that only a live view shows."""
    match event:
        case events.StateChanged(JobState.FAILED, _):
            return None
        case events.StateChanged(state, reason):
            return f"{state.value}. {reason}".strip()
        case events.Preparation():
            return None
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
                return f"version {evaluation.version}: {held_out}, on {evaluation.windows} windows of {evaluation.text}"
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
        if record.ahead:
            words.append(describe_ahead(record.ahead))
    if words:
        return "; ".join(words)
    if progress := record.progress:
        return f"step {progress.step}/{progress.max_steps}, loss {progress.loss:.3f}"
    return f"held-out loss {record.evaluation.validation_loss:.4f}" if record.evaluation else ""


def describe_ahead(ahead: int) -> str:
    """Describes how many jobs come first."""
    return "1 job comes first" if ahead == 1 else f"{ahead:,} jobs come first"


class _PlainView:
    """Prints a line for each event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""

    def __enter__(self) -> "_PlainView":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, waiting: Waiting) -> None:
        if waiting.ahead:
            self._print(str(waiting))

    def show(self, event: Event) -> None:
        line = describe(event)
        if isinstance(event, events.Preparation) and event.stage != self._stage:
            self._stage = line = event.stage
        if line:
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


class _LiveView:
    """Shows a bar with the last progress, and prints a line above it for each other event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = LiveBar(console, ("waiting for a worker",))

    def __enter__(self) -> "_LiveView":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def wait(self, waiting: Waiting) -> None:
        self._bar.show(None, str(waiting))

    def show(self, event: Event) -> None:
        match event:
            case events.Preparation(stage, fraction):
                self._bar.show(fraction, stage)
            case events.Progress() as progress:
                self._bar.show(progress.step / progress.max_steps, *_facts(progress))
            case _:
                if line := describe(event):
                    self._console.print(printable(line), markup=False, highlight=False)


def _facts(progress: events.Progress) -> list[str]:
    """Returns the progress in phrases, the most important first."""
    facts = [f"step {progress.step}/{progress.max_steps}", f"loss {progress.loss:.3f}"]
    if progress.eta_s is None:
        facts.append("the first step compiles")
    else:
        facts += [f"ETA {format_duration(progress.eta_s)}", f"{progress.tokens_per_second:,.0f} tokens/s"]
    if progress.best_validation_loss:
        facts.append(f"best held-out {progress.best_validation_loss:.3f}")
    return [*facts, f"lr {progress.learning_rate:.2e}"]
