"""One training run: where the registry, the text and the training loop meet."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from shared.device import accelerator
from shared.errors import CorruptCheckpoint, FailedPrecondition, GptloopError, NotFound
from shared.gpt.config import count_parameters
from shared.gpt.tokenizer import Tokenizer
from shared.registry.fence import Fence
from shared.registry.retention import prune
from shared.registry.store import Registry
from shared.version_format import TEXT_FILE, TOKENIZER_FILE, read_tokenizer
from trainer_service.jobs.attempt import Attempt, preparation_report
from trainer_service.jobs.events import Evaluation, Notice, Preparation, Progress, RunStarted, VersionPublished
from trainer_service.jobs.spec import JobSpec
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss
from trainer_service.training.loop import Outcome, train
from trainer_service.training.report import Report
from trainer_service.training.tokens import PreparedData, prepare
from trainer_service.training.trainer import Trainer, saved_config
from trainer_service.training.workers import Workers
from trainer_service.versions import changed_text, publish


def prepare_data(spec: JobSpec, attempt: Attempt) -> PreparedData:
    """The tokens of a run, made where they are not there yet; raises `Stopped` where somebody asks for the end.

    The tokenizer, and with it the size of the vocabulary, is that of the run so far, of the version that it continues,
    or the one that the configuration asks for. Raises `FailedPrecondition` if the run began with other text.
    """
    registry = Registry(attempt.directories.registry)
    state = _own_state(spec, registry)
    tokenizer = _tokenizer_so_far(spec, state, registry)
    config = spec.config
    if state is not None:
        config = replace(config, vocabulary_size=saved_config(state).vocabulary_size)

    report = preparation_report(attempt)
    data = prepare(
        spec.data, config, attempt.directories.data, lambda each: report(each.stage, each.fraction), tokenizer
    )
    for text in (*data.notices, *_other_text(spec, data, state, registry)):
        attempt.tell(Notice(text))
    return data


def _other_text(spec: JobSpec, data: PreparedData, state: Path | None, registry: Registry) -> Iterator[str]:
    """A sentence if the version that is continued saw other text under the same names; raises if the run itself did."""
    if state is not None:
        revision = _revision(state)
        if revision not in (None, data.revision):
            raise FailedPrecondition(
                f"The text of run {spec.run} is not the one that it began with: {data.source} has changed. Put the old "
                "text back, or start another run on the new one with --resume."
            )
    elif spec.resume is not None:
        parent = registry.version(spec.resume)
        if parent.training["validation_share"] == spec.config.validation_share:
            yield from changed_text(parent, spec.data, data)


def _own_state(spec: JobSpec, registry: Registry) -> Path | None:
    """The folder of the run's newest state that is whole, if it has one."""
    for step in reversed(registry.states(spec.run)):
        with suppress(CorruptCheckpoint, NotFound):
            return registry.verified_state(spec.run, step)
    return None


def _revision(state: Path) -> str | None:
    """The revision of the text that a state was trained on; None in states that do not say."""
    try:
        return str(json.loads((state / TEXT_FILE).read_text(encoding="utf-8"))["revision"])
    except FileNotFoundError:
        return None


def _tokenizer_so_far(spec: JobSpec, state: Path | None, registry: Registry) -> Tokenizer | None:
    if state is not None:
        return read_tokenizer(state)
    if spec.resume is None:
        return None
    return read_tokenizer(registry.version_directory(registry.version(spec.resume).version))


class TrainingRun:
    """Brings a run to its end, from the start, from the version that it continues, or from its own last state.

    Whoever asks it to stop while it prepares its data gets `Stopped`.

    It is the loop's observer: reports and evaluations become events, checkpoints become states and versions.
    """

    def __init__(self, spec: JobSpec, attempt: Attempt) -> None:
        self._attempt = attempt
        self._tell = attempt.tell
        self._registry = Registry(attempt.directories.registry)
        self._registry.sweep()
        self._data = prepare_data(spec, attempt)
        config = self._data.config
        self._spec = replace(spec, config=config)
        self._evaluation_set = EvaluationSet.from_tokens(
            self._data.validation,
            self._data.tokenizer,
            windows=config.evaluation_windows,
            context_length=config.context_length,
        )
        self._fence = Fence.raise_for(self._registry.run_directory(spec.run), attempt.number)

    def train(self) -> bool:
        """Trains; True where the schedule came to its end, False where somebody asked for the end before."""
        with Workers(self._attempt.device.threads) as workers:
            return self._train(workers)

    def _train(self, workers: Workers) -> bool:
        config = self._spec.config
        self._tell(Preparation("building the model"))
        trainer = Trainer(config, self._data.train, workers)
        self._restore(trainer)
        parameters = count_parameters(config.gpt)
        self._tell(
            RunStarted(
                parameters=parameters.total,
                embedding_parameters=parameters.embedding,
                train_tokens=self._data.train.size,
                validation_tokens=self._data.validation.size,
                tokenizer=self._data.tokenizer.name,
                first_step=trainer.step + 1,
                first_tokens=trainer.tokens,
                max_steps=config.max_steps,
                device=self._attempt.device.device,
                preparation_s=time.monotonic() - self._attempt.began_s,
            )
        )
        completed = train(trainer, self._evaluation_set, self, self._attempt.stop_requested) is Outcome.COMPLETED
        if completed:
            self._end()
        return completed

    def _restore(self, trainer: Trainer) -> None:
        """Goes on from the newest state that is whole: the run's own, else that of the version it continues."""
        run = self._spec.run
        for step in reversed(self._registry.states(run)):
            try:
                state = self._registry.verified_state(run, step)
            except (CorruptCheckpoint, NotFound) as error:
                self.notice(f"{error} An older state is used.")
                continue
            trainer.restore(state)
            for version in self._registry.versions():
                if (version.run, version.step) == (run, step):
                    # The state may be of a moment before that.
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
        # From here on the run does not need the version any more, which may be removed.
        self._keep_state(trainer)

    # The loop's observer.

    def report(self, report: Report) -> None:
        """Tells progress."""
        memory = accelerator.memory()
        self._tell(
            Progress(
                **vars(report),
                max_steps=self._spec.config.max_steps,
                active_memory_bytes=memory.active_bytes,
                cache_memory_bytes=memory.cache_bytes,
                peak_memory_bytes=memory.peak_bytes,
                resident_memory_bytes=memory.resident_bytes,
            )
        )

    def checkpoint(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        """Keeps the state, publishes a version, and removes what is too old.

        A registry that cannot be written now may be at the next evaluation. At the end of the schedule there is none,
        so what is too old makes room before the last try.
        """
        self._tell(Evaluation(trainer.step, trainer.training_loss, held_out.nats_per_token, held_out.bits_per_byte))
        is_last = trainer.step == self._spec.config.max_steps
        try:
            self._keep(trainer, held_out)
        except FailedPrecondition as error:
            if not is_last:
                self.notice(f"{error} Training goes on without this checkpoint.")
            else:
                self._prune()
                self._keep(trainer, held_out)
        self._prune()

    def _end(self) -> None:
        try:
            self._registry.end_run(self._spec.run)
        except FailedPrecondition as error:
            self.notice(f"{error} The run is kept as one that may go on.")
        self._prune()

    def _keep(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        # The state first, so that no version is without it. A run that dies between the two evaluates this step again,
        # as its state does not know of the evaluation yet.
        self._keep_state(trainer)
        if not any((each.run, each.step) == (self._spec.run, trainer.step) for each in self._registry.versions()):
            self._publish(trainer, held_out)

    def _prune(self) -> None:
        try:
            prune(self._registry, self._attempt.retention)
        except GptloopError as error:
            self.notice(f"Nothing old was removed: {error}")

    def _publish(self, trainer: Trainer, held_out: HeldOutLoss) -> None:
        version = publish(
            self._registry,
            self._fence,
            self._spec,
            self._data,
            trainer,
            self._evaluation_set,
            held_out,
        )
        best = self._registry.labels().get("best") == version.version
        self._tell(
            VersionPublished(version.version, trainer.step, held_out.nats_per_token, held_out.bits_per_byte, best)
        )

    def save(self, trainer: Trainer) -> None:
        """Keeps the state; where the registry cannot be written, the run goes on from an older one."""
        try:
            self._keep_state(trainer)
        except FailedPrecondition as error:
            self.notice(f"{error} The run goes on from an older state.")

    def _keep_state(self, trainer: Trainer) -> None:
        def write(folder: Path) -> None:
            trainer.save(folder)
            self._data.tokenizer.save(folder / TOKENIZER_FILE)
            (folder / TEXT_FILE).write_text(json.dumps({"revision": self._data.revision}), encoding="utf-8")

        self._registry.write_state(self._fence, self._spec.run, trainer.step, write)

    def notice(self, text: str) -> None:
        """Tells something that a person should know."""
        self._tell(Notice(text))
