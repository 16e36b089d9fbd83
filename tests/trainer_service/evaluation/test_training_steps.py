from dataclasses import replace
from pathlib import Path

import pytest

from shared.device.accelerator import Accelerator
from shared.errors import FailedPrecondition
from shared.gpt.config import count_parameters
from trainer_service.evaluation import training_steps
from trainer_service.evaluation.training_steps import StepCosts, measure_steps
from trainer_service.plan import Machine, memory_bytes
from trainer_service.presets import find_preset

HERE = Accelerator("A processor", "cpu", "", None, 1 << 40, Path(), threads=2)
TINY = replace(
    find_preset("demo"), vocabulary_size=300, layers=2, width=32, heads=2, hidden_width=64, context_length=64
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_steps, "_LEAST_S", 0.0)


def measured(*sizes: int, device: Accelerator = HERE, lines: list[str] | None = None) -> StepCosts:
    return measure_steps(TINY, sizes, device, ([] if lines is None else lines).append)


@pytest.mark.slow
def test_a_step_takes_more_memory_with_more_windows() -> None:
    lines: list[str] = []
    costs = measured(1, 8, 64, lines=lines)
    assert [each.batch_size for each in costs.memory] == [1, 8, 64]
    activations = [each.activations_bytes for each in costs.memory]
    assert activations == sorted(activations)
    # Each window's tokens have at least the values after each of the norms, for their gradients.
    assert activations[-1] - activations[0] > 4 * (2 * TINY.layers) * TINY.width * TINY.context_length * 16
    for each in costs.memory:
        assert each.estimated_bytes == memory_bytes(replace(TINY, batch_size=each.batch_size), Machine(1 << 40, 2))
        assert each.peak_bytes > each.activations_bytes
    assert (costs.threads, costs.rows) == (2, 64)
    assert costs.tokens_per_s > 0
    # Two moments of each parameter, and the number of steps.
    assert costs.optimizer_bytes == 2 * 4 * count_parameters(TINY.gpt).total + 4
    assert [line.partition(":")[0] for line in lines] == ["batch size 1", "batch size 8", "batch size 64", "training"]


def test_sizes_that_do_not_fit_into_memory_are_left_out() -> None:
    needed = {size: memory_bytes(replace(TINY, batch_size=size), Machine(0, 2)) or 0 for size in (1, 64)}
    some = replace(HERE, memory_bytes=needed[64] - 1)
    costs = measured(1, 64, device=some)
    assert [each.batch_size for each in costs.memory] == [1]
    assert costs.rows == 1
    with pytest.raises(
        FailedPrecondition, match=r"Training is expected to need .* with a batch size of 1, but this mach"
    ):
        measured(1, 64, device=replace(HERE, memory_bytes=needed[1] - 1))
