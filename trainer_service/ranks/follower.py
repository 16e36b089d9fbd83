"""Another rank than the first: takes its part of each step. Rank 0 alone evaluates, reports and writes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shared.errors import FailedPrecondition
from shared.gpt.config import GPTConfig
from shared.version_format import read_model
from trainer_service.jobs.attempt import Attempt
from trainer_service.jobs.specs import TrainSpec
from trainer_service.ranks.together import follow, together
from trainer_service.ranks.watchdog import Watchdog
from trainer_service.run import prepare_data
from trainer_service.teachers import teachers_of
from trainer_service.text.tokens import PreparedData
from trainer_service.training.batches import TrainingText
from trainer_service.training.loop import train
from trainer_service.training.ranks import Ranks
from trainer_service.training.trainer import Trainer
from trainer_service.training.workers import Workers


@dataclass(frozen=True)
class Follower:
    """The part of a rank that is not the first; it reads the same text and teachers, and gets the state from rank 0."""

    spec: TrainSpec
    attempt: Attempt
    ranks: Ranks

    def train(self) -> bool:
        """Trains as `TrainingRun` does, in whose constructor and method `train` the same waits are.

        Returns whether the schedule has ended.
        """
        attempt, spec = self.attempt, self.spec
        data = follow(self.ranks, self._prepare, attempt.stop_requested)
        with Workers(attempt.device.threads) as workers, Watchdog() as watchdog:
            trainer = together(self.ranks, lambda _: self._build(data, workers), attempt.stop_requested)
            stop_requested = watchdog.watched(attempt.stop_requested)
            completed = train(trainer, None, None, stop_requested, watchdog.pause, spec.last_step)
        return completed and trainer.step == spec.config.max_steps

    def _prepare(self, revision: str, must_end: Callable[[], bool]) -> PreparedData:
        data = prepare_data(self.spec, replace(self.attempt, stop_requested=must_end))
        if data.revision != revision:
            raise FailedPrecondition(
                f"The text of rank {self.ranks.rank} is not that of rank 0: every machine must read the same "
                f"{data.source}."
            )
        return data

    def _build(self, data: PreparedData, workers: Workers) -> Trainer:
        teachers = teachers_of(self.spec, self.attempt.open_registry()) if self.spec.config.distillation_alpha else []
        models = [read_model(each.folder, GPTConfig.from_dict(each.manifest.model)) for each in teachers]
        text = TrainingText(data.train, data.tokenizer.end_token, data.teacher)
        return Trainer(data.config, text, workers, models, self.ranks)
