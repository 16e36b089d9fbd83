from dataclasses import replace
from pathlib import Path

import pytest

from shared.device.accelerator import Accelerator
from trainer_service.evaluation import training_steps
from trainer_service.evaluation.training_steps import StepCosts, measure_steps
from trainer_service.plan import count_moments
from trainer_service.presets import find_preset

HERE = Accelerator("A processor", "cpu", "", 1 << 40, Path(), threads=2)
TINY = replace(
    find_preset("demo"), vocabulary_size=300, layers=2, width=32, heads=2, hidden_width=64, context_length=64
)


def measured(batch_size: int, timed: bool = False) -> StepCosts:
    return measure_steps(replace(TINY, batch_size=batch_size), HERE, timed=timed)


@pytest.mark.slow
def test_a_step_takes_more_memory_with_more_windows() -> None:
    few, many = measured(2), measured(32)
    # Each window's tokens have at least the values after each of the norms, for their gradients.
    norms_bytes = 4 * 2 * TINY.layers * TINY.width * TINY.context_length
    assert many.activations_bytes - few.activations_bytes > 14 * norms_bytes
    for each in (few, many):
        assert each.peak_bytes > each.activations_bytes
        assert each.tokens_per_s is None
        assert each.threads == 2
        # The moments, and the number of steps.
        assert each.optimizer_bytes == 4 * count_moments(TINY) + 4


def test_steps_are_timed_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_steps, "_LEAST_S", 0.0)
    found = measured(2, timed=True).tokens_per_s
    assert found is not None
    assert found > 0
