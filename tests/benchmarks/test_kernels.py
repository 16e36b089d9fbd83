"""The floors of the kernels of a decode step on an NVIDIA GPU."""

import pytest

from shared.decoding.cuda.program import kernels
from tests.benchmarks.floor import Machine
from tests.benchmarks.kernels import floors_of
from trainer_service.presets import find_preset


def test_every_kernel_of_a_step_has_one_floor_and_they_sum_to_that_of_the_step() -> None:
    config, machine = find_preset("tinystories-53m").gpt, Machine(flops=1e15, bytes_per_s=4e12, bytes_per_number=2)
    floors = floors_of(config, 64, 256, machine)
    for name in kernels():
        assert sum(name.startswith(kind) for kind in floors) == (name not in ("score_tokens", "continue_rows")), name
    layer = sum(floors[kind] for kind in ("qkv", "attend", "attention_output", "up", "down"))
    others = sum(floors[kind] for kind in ("embed", "normalise", "head", "sum_ranges", "draw"))
    whole = machine.decode_s(config, 64, 256)
    # Kernels also read and write what goes from one to the next, and logits.
    assert whole < config.layers * layer + others < 1.5 * whole
    assert floors["attend"] * config.layers == pytest.approx(64 * 256 * 8 * 384 * 4 / 4e12, rel=0.01)
