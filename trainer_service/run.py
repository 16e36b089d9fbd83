"""One training run: where the registry, the text and the training loop meet."""

from collections.abc import Callable
from pathlib import Path

from shared import accelerator
from shared.accelerator import Accelerator
from shared.errors import CorruptCheckpoint
from shared.gpt.config import count_parameters
from shared.gpt.tokenizer import Tokenizer
from shared.registry.fence import Fence
from shared.registry.retention import prune
from shared.registry.store import Registry
from shared.settings import Directories
from trainer_service.events import Evaluation, Event, Notice, Preparation, Progress, RunStarted, VersionPublished
from trainer_service.spec import JobSpec
from trainer_service.training.evaluate import EvaluationSet, HeldOutLoss
from trainer_service.training.loop import Outcome, Report, train
from trainer_service.training.tokens import PreparedData, PrepareProgress, prepare
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers
from trainer_service.versions import publish


class StoppedInPreparation(Exception):
    """Somebody asked the run to stop before its first step, so there is no state to keep."""


class TrainingRun:
    """Brings a run to its end, from the start, from the version that it continues, or from its own last state.

    Whoever asks it to stop while it prepares its data gets `StoppedInPreparation`.

    It is the loop's observer: reports and evaluations become events, checkpoints become states and versions.
    """

    def __init__(
        self,
        spec: JobSpec,
        directories: Directories,
        tell: Callable[[Event], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self._spec = spec
        self._tell = tell
        self._stop_requested = stop_requested
        self._registry = Registry(directories.registry)
        self._registry.sweep()
        self._parent = self._registry.version(spec.resume) if spec.resume is not None else None
        self._data = self._prepare(directories.data)
        config = spec.config
        self._evaluation_set = EvaluationSet.from_tokens(
            self._data.validation,
            self._data.tokenizer,
            windows=config.evaluation_windows,
            context_length=config.context_length,
        )
        self._fence = Fence.raise_for(self._registry.run_directory(spec.run))

    def _prepare(self, directory: Path) -> PreparedData:
        tokenizer = None
        if self._parent:
            tokenizer = Tokenizer.load(self._registry.version_directory(self._parent.version) / "tokenizer.json")
        data = prepare(self._spec.data, self._spec.config, directory, self._report_preparation, tokenizer)
        for text in data.notices:
            self.notice(text)
        return data

    def _report_preparation(self, progress: PrepareProgress) -> None:
        if self._stop_requested():
            raise StoppedInPreparation
        self._tell(Preparation(progress.stage, progress.fraction))

    def train(self, device: Accelerator) -> bool:
        """Trains; True where the schedule came to its end, False where `stop_requested` ended it before."""
        with Workers(device.threads) as workers:
            return self._train(device, workers)

    def _train(self, device: Accelerator, workers: Workers) -> bool:
        config = self._spec.config
        self._tell(Preparation("building the model"))
        trainer = Trainer(config, self._data.train, workers)
        if state := self._last_state():
            trainer.restore(state)
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
                device=device.device,
            )
        )
        return train(trainer, self._evaluation_set, self, self._stop_requested) is Outcome.COMPLETED

    def _last_state(self) -> Path | None:
        """The newest state that is whole: the run's own, else that of the version it continues."""
        run = self._spec.run
        for step in reversed(self._registry.states(run)):
            try:
                return self._registry.verified_state(run, step)
            except CorruptCheckpoint as error:
                self.notice(f"{error} An older state is used.")
        if self._parent:
            return self._registry.verified_state(self._parent.run, self._parent.step)
        return None

    # The loop's observer.

    def report(self, report: Report) -> None:
        """Tells progress."""
        memory = accelerator.memory()
        self._tell(
            Progress(
                step=report.step,
                max_steps=self._spec.config.max_steps,
                loss=report.loss,
                learning_rate=report.learning_rate,
                gradient_norm=report.gradient_norm,
                tokens=report.tokens,
                tokens_per_second=report.tokens_per_second,
                eta_s=report.eta_s,
                best_validation_loss=report.best_validation_loss,
                active_memory_bytes=memory.active_bytes,
                cache_memory_bytes=memory.cache_bytes,
                peak_memory_bytes=memory.peak_bytes,
                resident_memory_bytes=memory.resident_bytes,
            )
        )

    def checkpoint(self, trainer: Trainer, training_loss: float, held_out: HeldOutLoss) -> None:
        """Publishes a version, keeps the state, and removes what is too old."""
        self._tell(Evaluation(trainer.step, training_loss, held_out.nats_per_token, held_out.bits_per_byte))
        # The version first: a run that dies between the two goes on from an older state and comes by here again.
        if not any((each.run, each.step) == (self._spec.run, trainer.step) for each in self._registry.versions()):
            self._publish(trainer, training_loss, held_out)
        self.save(trainer)
        prune(self._registry, self._spec.run)

    def _publish(self, trainer: Trainer, training_loss: float, held_out: HeldOutLoss) -> None:
        version = publish(
            self._registry,
            self._fence,
            self._spec,
            self._data,
            trainer,
            self._evaluation_set,
            training_loss,
            held_out,
        )
        best = self._registry.labels()["best"] == version.version
        self._tell(
            VersionPublished(version.version, trainer.step, held_out.nats_per_token, held_out.bits_per_byte, best)
        )

    def save(self, trainer: Trainer) -> None:
        """Keeps the state."""
        self._registry.write_state(self._fence, self._spec.run, trainer.step, trainer.save)

    def notice(self, text: str) -> None:
        """Tells something that a person should know."""
        self._tell(Notice(text))
