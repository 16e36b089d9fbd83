from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.device.machine import memory_limit_bytes
from shared.errors import FailedPrecondition
from shared.gpt.config import count_parameters
from tests.decoders import COMPILED
from tests.fakes import TINY, publish_tiny_version
from tests.registries import disk_registry, version_folder
from trainer_service.evaluation import speed
from trainer_service.evaluation.speed import batch_sizes, measure_speed
from trainer_service.plan import Machine, count_moments, memory_bytes
from trainer_service.presets import find_preset
from trainer_service.training.config import TrainingConfig

CONFIG = replace(find_preset("demo"), batch_size=3, **TINY.to_dict())  # type: ignore[arg-type]


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a version; what its measurement compiles is kept from one run of the tests to the next."""
    monkeypatch.setenv("GPTLOOP_VAR", str(COMPILED))
    registry = disk_registry(tmp_path / "registry")
    return version_folder(registry, publish_tiny_version(registry, 1.0).version)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_memory_is_measured_at_powers_of_two_and_at_the_batch_size(largest: int, sizes: list[int]) -> None:
    assert batch_sizes(largest) == sizes


@pytest.mark.slow
def test_serving_and_training_are_measured_in_processes_of_their_own(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROWS", (2,))
    shares: list[float] = []
    speeds, memory = measure_speed(version, replace(CONFIG, world_size=2), 2, shares.append)
    assert [each.rows for each in speeds.decoding] == [2]
    assert (speeds.threads, speeds.serving_threads, speeds.training_rows) == (2, 1, 3)
    assert min(speeds.training_tokens_per_s, speeds.prefill_tokens_per_s) > 0
    assert memory.weights_bytes == 4 * count_parameters(TINY).total
    assert memory.optimizer_bytes == 4 * count_moments(CONFIG) + 4
    # A byte a parameter at least, and two slots.
    slots = memory.cache_bytes_per_token * 2 * TINY.context_length
    assert memory.serving_bytes > count_parameters(TINY).total + slots
    assert [each.batch_size for each in memory.training] == [1, 2, 3]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    # Each part of the work shows.
    assert len(set(shares)) >= 5
    for each in memory.training:
        machine = Machine(memory_limit_bytes(), 2)
        assert each.estimated_bytes == memory_bytes(replace(CONFIG, batch_size=each.batch_size), machine)
        assert each.peak_bytes > each.activations_bytes > 0


def test_batch_sizes_that_do_not_fit_into_memory_are_left_out(version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def trained(config: TrainingConfig, *_: object) -> dict[str, Any]:
        sizes.append(config.batch_size)
        return dict.fromkeys(("threads", "tokens_per_s", "optimizer_bytes", "activations_bytes", "peak_bytes"), 1)

    served = dict.fromkeys(("device", "threads", "prefill_tokens_per_s", "weights_bytes", "cache_bytes_per_token"), 1)
    monkeypatch.setattr(speed, "_serving", lambda *_: served | {"decoding": [], "memory_bytes": 1})
    monkeypatch.setattr(speed, "_training", trained)
    monkeypatch.setattr(speed, "memory_bytes", lambda config, _: 100 * config.batch_size)
    monkeypatch.setattr(speed, "memory_limit_bytes", lambda: 200)
    speeds, memory = measure_speed(version, CONFIG, 2, lambda _: None)
    assert sizes == [each.batch_size for each in memory.training] == [1, 2]
    assert speeds.training_rows == 2
    monkeypatch.setattr(speed, "memory_limit_bytes", lambda: 99)
    with pytest.raises(FailedPrecondition, match=r"^Training is expected to need .* with a batch size of 1, but this "):
        measure_speed(version, CONFIG, 2, lambda _: None)


@pytest.mark.slow
def test_a_process_that_fails_says_why(version: Path) -> None:
    (version / "tokenizer.json").write_text("")
    with pytest.raises(
        FailedPrecondition, match=r"^The speed of serving cannot be measured, because its process ended "
    ):
        measure_speed(version, CONFIG, 2, lambda _: None)


@pytest.mark.slow
def test_an_exception_of_the_report_ends_the_work(version: Path) -> None:
    with pytest.raises(InterruptedError):
        measure_speed(version, CONFIG, 2, raising(InterruptedError()))


def raising(error: Exception) -> Callable[[float], None]:
    def report(_: float) -> None:
        raise error

    return report
