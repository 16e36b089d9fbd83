"""One training run: joins the registry, the text and the training loop."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from shared.device import accelerator
from shared.device.machine import memory_limit_bytes
from shared.errors import (
    CorruptCheckpoint,
    FailedPrecondition,
    GptloopError,
    NotFound,
    StoreFailed,
    UnreadableCheckpoint,
)
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT
from shared.registry.history import EvaluationLine, Line, ReportLine
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.registry.retention import prune
from shared.service import traces
from shared.version_format import TEXT_FILE, TOKENIZER_FILE, read_model, read_tokenizer
from trainer_service.evaluation.due import DueEvaluations
from trainer_service.evaluation.judge import Judge
from trainer_service.evaluation.texts import Texts, read_texts
from trainer_service.jobs.attempt import Attempt, Suspended, preparation_report
from trainer_service.jobs.events import Evaluation, Notice, Preparation, Progress, RunStarted, VersionPublished
from trainer_service.jobs.specs import RunSpec, TrainSpec
from trainer_service.ranks.together import lead, together
from trainer_service.ranks.watchdog import Watchdog
from trainer_service.teachers import keep_teachers, of_other_text, taught_by, teachers_of, with_tokenizer
from trainer_service.text.corpus import DatasetSpec
from trainer_service.text.tokens import PreparedData, prepare
from trainer_service.training.batches import TrainingText
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss
from trainer_service.training.loop import train
from trainer_service.training.ranks import Ranks
from trainer_service.training.report import Report
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers
from trainer_service.versions import changed_text, publish


def prepare_data(spec: RunSpec, attempt: Attempt) -> PreparedData:
    """Returns the tokens of a run, and prepares them if they are missing.

    The tokenizer, and with it the size of the vocabulary, is that of the run's last state, or else of the version that
    the run continues, or else of its teachers, or else the configured one. Raises the errors of `prepare` and of
    `teachers_of`, `FailedPrecondition` if the run began with other text, and `Stopped` if the attempt has to end.
    """
    registry = attempt.open_registry()
    state = _own_state(spec.run, registry)
    config, source = spec.config, state
    if state is None and spec.resume is not None:
        source = registry.fetch(registry.version(spec.resume))
    elif state is None and spec.teachers:
        source = teachers_of(spec, registry)[0].folder
    tokenizer = read_tokenizer(source) if source else None
    if tokenizer and spec.teachers:
        config = with_tokenizer(config, tokenizer.name, tokenizer.vocabulary_size)
    report = preparation_report(attempt)
    # A set of stories may have grown since the run was queued.
    stories = _begun_with(state).get("stories", spec.stories) if state else spec.stories
    data = prepare(
        spec.data, config, attempt.directories.data, report, tokenizer, stories=stories, shared=attempt.shared_tokens()
    )
    for text in (*data.notices, *_other_text(spec, data, state, registry)):
        attempt.emit(Notice(text))
    return data


def _other_text(spec: RunSpec, data: PreparedData, state: Path | None, registry: Registry) -> Iterator[str]:
    """Yields a sentence if the version that is continued saw other text under the same names; raises if the run did."""
    if state is not None:
        if _begun_with(state).get("revision", data.revision) != data.revision:
            raise FailedPrecondition(
                f"The text of run {spec.run} is not the text that it began with: {data.source} has changed. Put the "
                "old text back, or start another run on the new text with --resume."
            )
    elif spec.resume is not None:
        parent = registry.version(spec.resume)
        if parent.training["validation_share"] == spec.config.validation_share:
            yield from changed_text(parent, spec.data, data)


def _begun_with(state: Path) -> dict[str, Any]:
    """Returns what a state says about the text of its run."""
    path = state / TEXT_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _own_state(run: str, registry: Registry, notice: Callable[[str], object] = lambda _: None) -> Path | None:
    """Returns the folder of the run's newest whole state; None if it has none.

    `notice` gets a sentence for each other one. Raises `StoreFailed` if states are there, but none can be read now.
    """
    unreadable = None
    for step in reversed(registry.states(run)):
        try:
            return registry.verified_state(run, step)
        except (CorruptCheckpoint, NotFound) as error:
            notice(f"{error} An older state is used, if there is one.")
            # A damaged one stays damaged; one that is listed and cannot be read may come back.
            if isinstance(error, NotFound | UnreadableCheckpoint):
                unreadable = error
    if unreadable:
        raise StoreFailed(str(unreadable)) from unreadable
    return None


class TrainingRun:
    """Trains a run to its end: from the start, from the version that it continues, or from its own last state.

    It is the observer of the training loop: turns reports and evaluations into events, and checkpoints into states and
    versions. If there are several ranks, this is the first, and the others are `Follower`s.
    """

    def __init__(self, spec: TrainSpec, attempt: Attempt, ranks: Ranks | None = None) -> None:
        # Preparing the data raises `Stopped` if the attempt has to end.
        self._attempt = attempt
        self._ranks = ranks or Ranks.alone()
        self._emit = attempt.emit
        self._registry = attempt.open_registry()
        self._registry.sweep()
        self._data = lead(self._ranks, partial(self._prepare, spec), lambda data: data.revision, attempt.stop_requested)
        teachers = [each.manifest for each in self._teachers]
        before = [earlier for each in teachers for earlier in taught_by(each, self._registry)]
        for text in dict.fromkeys(of_other_text((*teachers, *before), self._data.revision)):
            self.notice(text)
        config = self._data.config
        self._spec = replace(spec, config=config)
        self._evaluation_set = EvaluationSet.from_tokens(
            self._data.validation,
            self._data.tokenizer,
            windows=config.evaluation_windows,
            context_length=config.context_length,
        )
        self._fence = self._registry.take_over(spec.run, attempt.number)
        self._due: DueEvaluations | None = None

    def _prepare(self, spec: TrainSpec, must_end: Callable[[], bool]) -> PreparedData:
        self._teachers = keep_teachers(spec, self._registry, self._attempt.number)
        try:
            with traces.span("prepare"):
                return prepare_data(spec, replace(self._attempt, stop_requested=must_end))
        except GptloopError:
            if not self._registry.states(spec.run):
                self._registry.teachers.remove(spec.run)
            raise

    def train(self) -> bool:
        """Trains; returns True at the end of the schedule, and False if the attempt had to end before.

        Raises `Suspended` at the step at which the job waits.
        """
        config, attempt = self._spec.config, self._attempt
        with Workers(attempt.device.threads) as workers:
            self._emit(Preparation("building the model"))
            trainer = together(self._ranks, lambda _: self._build(workers), attempt.stop_requested)
            self._evaluated = self._published(trainer)
            self._history = self._registry.histories.writer(self._fence, trainer.step, self._evaluated)
            self._history_fails = False
            self._record()
            parameters = count_parameters(config.gpt)
            count, device = self._ranks.count, attempt.device.device
            self._emit(
                RunStarted(
                    parameters=parameters.total,
                    embedding_parameters=parameters.embedding,
                    train_tokens=self._data.train.size,
                    validation_tokens=self._data.validation.size,
                    tokenizer=self._data.tokenizer.name,
                    first_step=trainer.step + 1,
                    first_tokens=trainer.tokens,
                    max_steps=config.max_steps,
                    device=f"{count} ranks on {device}" if count > 1 else device,
                    preparation_s=time.monotonic() - attempt.began_s,
                    memory_limit_bytes=memory_limit_bytes(),
                )
            )
            if config.evaluate_every:
                judge = Judge(self._registry, attempt.device, workers, preparation_report(attempt))
                self._due = DueEvaluations(
                    self._spec.run, config, self._registry, judge, self._whole_texts, self.notice
                )
                self._due.measure()
            with traces.span("train", {"gptloop.first_step": trainer.step + 1}), Watchdog() as watchdog:
                stop_requested = watchdog.watched(attempt.stop_requested) if count > 1 else attempt.stop_requested
                completed = train(
                    trainer, self._evaluation_set, self, stop_requested, watchdog.pause, self._spec.last_step
                )
            if completed and trainer.step < config.max_steps:
                self._suspend(trainer)
            if completed:
                self._end()
        return completed

    def _build(self, workers: Workers) -> Trainer:
        text = TrainingText(self._data.train, self._data.tokenizer.end_token, self._data.teacher)
        trainer = Trainer(self._spec.config, text, workers, self._read_teachers(), self._ranks)
        self._restore(trainer)
        return trainer

    def _read_teachers(self) -> list[GPT]:
        return [read_model(each.folder, GPTConfig.from_dict(each.manifest.model)) for each in self._teachers]

    def _restore(self, trainer: Trainer) -> None:
        """Restores the newest undamaged state of the run, or else the state of the version that it continues."""
        run = self._spec.run
        if state := _own_state(run, self._registry, self.notice):
            trainer.restore(state)
            if version := self._version_of(trainer.step):
                # The state may be older than the evaluation.
                trainer.record_evaluation(version.validation_loss)
            return
        if self._spec.resume is None:
            return
        parent = self._registry.version(self._spec.resume)
        trainer.restore(self._registry.verified_state(parent.run, parent.step))
        trainer.record_evaluation(parent.validation_loss)
        if parent.evaluation_set != self._evaluation_set.digest:
            trainer.best_validation_loss = None  # losses on different sets do not compare
        if trainer.step == self._spec.config.schedule_start > 0:
            rate = self._spec.config.learning_rate
            self.notice(f"A new schedule begins after step {trainer.step:,}; its highest rate is {rate:.1e}.")
        # With a state of its own, the run no longer needs the version, which may be removed.
        self._keep_state(trainer)

    def _published(self, trainer: Trainer) -> EvaluationLine | None:
        """Returns the evaluation of the trainer's step, if the run has published its version."""
        version = self._version_of(trainer.step)
        if version is None:
            return None
        loss, bits, at = version.validation_loss, version.bits_per_byte, version.created_at
        return EvaluationLine(trainer.step, trainer.tokens, loss, bits, version.version, at, self._attempt.number)

    # The methods of the loop's observer.

    def report(self, report: Report) -> None:
        """Emits progress, and adds it to the history of the run."""
        memory = accelerator.memory()
        self._record(
            ReportLine(
                step=report.step,
                tokens=report.tokens,
                loss=report.loss,
                learning_rate=report.learning_rate,
                gradient_norm=report.gradient_norm,
                tokens_per_second=report.tokens_per_second,
                active_memory_bytes=memory.active_bytes,
                peak_memory_bytes=memory.peak_bytes,
                resident_memory_bytes=memory.resident_bytes,
                time=time.time(),
                attempt=self._attempt.number,
            )
        )
        self._emit(
            Progress(
                **vars(report),
                max_steps=self._spec.config.max_steps,
                active_memory_bytes=memory.active_bytes,
                cache_memory_bytes=memory.cache_bytes,
                peak_memory_bytes=memory.peak_bytes,
                resident_memory_bytes=memory.resident_bytes,
            )
        )

    @traces.span("checkpoint")
    def checkpoint(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        """Keeps the state, publishes a version, and prunes the registry.

        If the registry cannot be written, the next evaluation tries again. After the last step of an attempt no
        evaluation follows, so pruning makes room for a second try.
        """
        loss, bits = held_out.nats_per_token, held_out.bits_per_byte
        self._emit(Evaluation(trainer.step, trainer.training_loss, loss, bits))
        # A state is never on the disk without the lines before it.
        self._record(synced=True)
        is_last = trainer.step == self._spec.last_step
        version = None
        try:
            version = self._keep(trainer, held_out)
        except FailedPrecondition as error:
            if not is_last:
                self.notice(f"{error} Training continues without this checkpoint.")
            else:
                self._prune()
                version = self._keep(trainer, held_out)
        if version is not None:
            traces.mark({"gptloop.version": version})
        at, attempt = time.time(), self._attempt.number
        self._evaluated = EvaluationLine(trainer.step, trainer.tokens, loss, bits, version, at, attempt)
        self._record(self._evaluated)
        self._prune()
        if self._due:
            self._due.measure()

    def _whole_texts(self, version: VersionManifest) -> Texts:
        report = preparation_report(self._attempt)
        directory, data = self._attempt.directories.data, self._data
        return read_texts(
            version,
            DatasetSpec(()),
            data.tokenizer,
            directory,
            report,
            stories=data.stories,
            shared=self._attempt.shared_tokens(),
        )

    def _record(self, *lines: Line, synced: bool = False) -> None:
        """Adds lines to the history of the run; a disk that fails costs lines, and not the run."""
        try:
            self._history.append(*lines, synced=synced)
        except FailedPrecondition as error:
            if not self._history_fails:
                self.notice(f"{error} The history of the run lacks lines until it can be written.")
            self._history_fails = True
        else:
            self._history_fails = False

    def _suspend(self, trainer: Trainer) -> NoReturn:
        self._record(synced=True)
        # The step at which a job waits is a multiple of `evaluation_interval`.
        assert self._evaluated is not None and self._evaluated.step == trainer.step
        loss, bits = self._evaluated.validation_loss, self._evaluated.bits_per_byte
        raise Suspended(Evaluation(trainer.step, trainer.training_loss, loss, bits))

    def _end(self) -> None:
        self._record(synced=True)
        try:
            self._registry.end_run(self._spec.run)
        except FailedPrecondition as error:
            self.notice(f"{error} The run is kept as unfinished.")
        self._prune()

    def _keep(self, trainer: Trainer, held_out: HeldOutLoss) -> int:
        """Keeps the state, and returns the number of its version, which it publishes if it is not there yet."""
        # The state is first, so that every version has one. A run that dies between the two evaluates this step again,
        # because its state does not contain the evaluation yet.
        self._keep_state(trainer)
        if present := self._version_of(trainer.step):
            return present.version
        teachers = [each.manifest for each in self._teachers]
        version = publish(
            *(self._registry, self._fence, self._spec, self._data, trainer, self._evaluation_set, held_out, teachers)
        )
        self._emit(
            VersionPublished(
                version.version,
                trainer.step,
                held_out.nats_per_token,
                held_out.bits_per_byte,
                self._is_best(version.version),
            )
        )
        return version.version

    def _is_best(self, number: int) -> bool:
        """Returns whether a version has the label `best`; False if the registry cannot be read."""
        try:
            return self._registry.labels().get("best") == number
        except StoreFailed:
            return False

    def _version_of(self, step: int) -> VersionManifest | None:
        """Returns the version that the run has published at a step."""
        return next(
            (each for each in self._registry.versions() if (each.run, each.step) == (self._spec.run, step)), None
        )

    def _prune(self) -> None:
        try:
            prune(self._registry, self._attempt.retention)
        except GptloopError as error:
            self.notice(f"Nothing old was removed: {error}")

    def save(self, trainer: Trainer) -> None:
        """Keeps the state; if the registry cannot be written, the run later resumes from an older one."""
        self._record(synced=True)
        try:
            self._keep_state(trainer)
        except FailedPrecondition as error:
            self.notice(f"{error} The run resumes from an older state.")

    def _keep_state(self, trainer: Trainer) -> None:
        def write(folder: Path) -> None:
            trainer.save(folder)
            self._data.tokenizer.save(folder / TOKENIZER_FILE)
            text = {"revision": self._data.revision, "stories": self._data.stories}
            (folder / TEXT_FILE).write_text(json.dumps(text), encoding="utf-8")

        self._registry.write_state(self._fence, trainer.step, write)

    def notice(self, text: str) -> None:
        """Emits a sentence for the user."""
        self._emit(Notice(text))
