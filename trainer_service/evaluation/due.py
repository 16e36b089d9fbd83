"""Evaluates each n-th version of a run while the run trains."""

from collections.abc import Callable

from shared.errors import GptloopError, StoreFailed
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from trainer_service.evaluation.judge import Judge
from trainer_service.evaluation.texts import Texts
from trainer_service.jobs.attempt import Stopped
from trainer_service.training.config import TrainingConfig


class DueEvaluations:
    """The versions of a run whose records `evaluate_every` asks for.

    `read_texts` returns the texts of the run. `notice` receives sentences for the user: an evaluation that fails does
    not fail the run.
    """

    def __init__(
        self,
        run: str,
        config: TrainingConfig,
        registry: Registry,
        judge: Judge,
        read_texts: Callable[[VersionManifest], Texts],
        notice: Callable[[str], object],
    ) -> None:
        self._run = run
        self._config = config
        self._registry = registry
        self._judge = judge
        self._read_texts = read_texts
        self._notice = notice
        self._texts: Texts | None = None
        self._failed = set[int]()

    def measure(self) -> None:
        """Completes the records of the versions that are due; a stop leaves the rest to the next call."""
        try:
            versions = self._registry.versions()
        except StoreFailed as error:
            self._notice(f"{error} Training continues, without evaluations until the registry can be read.")
            return
        for version in versions:
            if version.run != self._run or not is_due(version.step, self._config):
                continue
            try:
                self._texts = self._texts or self._read_texts(version)
                self._judge.quality(version, self._texts)
            except Stopped:
                return
            except GptloopError as error:
                if version.version not in self._failed:
                    self._notice(f"{error} Training continues without the evaluation of version {version.version}.")
                self._failed.add(version.version)


def is_due(step: int, config: TrainingConfig) -> bool:
    """Returns whether the version of a step gets a record: each n-th one of the run and the last one."""
    interval = config.evaluate_every * config.evaluation_interval
    return interval > 0 and (step % interval == 0 or step == config.max_steps)
