"""Measures the speed and the memory of a version on this machine, in serving and in training.

Serving, and training with each batch size, are measured in processes of their own. So neither the memory of this
process counts, nor what another measurement has left, and the work can be ended at any moment.
`python -m trainer_service.evaluation.speed` is the process that trains.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from shared.device import accelerator
from shared.device.machine import memory_limit_bytes
from shared.errors import FailedPrecondition
from shared.service import cli
from shared.service.reader import end_without_reader
from shared.service.settings import read_directories
from shared.text import format_size
from trainer_service.child_process import last_line
from trainer_service.evaluation.record import DecodingSpeed, Memory, Speed, TrainingMemory
from trainer_service.plan import Machine, memory_bytes
from trainer_service.training.config import TrainingConfig

# The numbers of requests at once.
ROWS = (1, 8, 32)
# The share of the work that serving is.
_SERVING_SHARE = 0.5

_DECODING = TypeAdapter(tuple[DecodingSpeed, ...])


def measure_speed(
    folder: Path, config: TrainingConfig, threads: int, report: Callable[[float], object]
) -> tuple[Speed, Memory]:
    """Measures the version in a folder, which was trained with `config`.

    On a CPU, training takes `threads` threads, and serving as many as the inference service is set to. Batch sizes with
    which training is expected to need more memory than there is are left out; the speed is that of the last one.
    `report` receives the share that is done, several times a second; an exception from it ends the work. Raises
    `FailedPrecondition` if no batch size is left, or if a process fails, for example because memory is short.
    """
    machine = Machine(memory_limit_bytes(), threads if Machine.here().threads is not None else None)
    configs = [replace(config, batch_size=size, world_size=1) for size in batch_sizes(config.batch_size)]
    estimates = [memory_bytes(each, machine) for each in configs]
    fitting = [
        (each, need) for each, need in zip(configs, estimates, strict=True) if (need or 0) <= machine.memory_bytes
    ]
    if not fitting:
        raise FailedPrecondition(
            f"Training is expected to need {format_size(estimates[0] or 0)} with a batch size of 1, but this machine "
            f"has {format_size(machine.memory_bytes)} of memory."
        )
    # The processes need what this one has freed.
    accelerator.release_memory()
    served = _serving(folder, lambda share: report(_SERVING_SHARE * share))
    trained, memory = {}, []
    for number, (each, estimate) in enumerate(fitting):
        done = _SERVING_SHARE + (1 - _SERVING_SHARE) * number / len(fitting)
        trained = _training(each, threads, number == len(fitting) - 1, partial(report, done))
        memory.append(TrainingMemory(each.batch_size, trained["activations_bytes"], trained["peak_bytes"], estimate))
    report(1.0)
    return Speed(
        device=served["device"],
        threads=trained["threads"],
        training_rows=fitting[-1][0].batch_size,
        training_tokens_per_s=trained["tokens_per_s"],
        prefill_tokens_per_s=served["prefill_tokens_per_s"],
        decoding=_DECODING.validate_python(served["decoding"]),
        serving_threads=served["threads"],
    ), Memory(
        weights_bytes=served["weights_bytes"],
        optimizer_bytes=trained["optimizer_bytes"],
        cache_bytes_per_token=served["cache_bytes_per_token"],
        serving_bytes=served["memory_bytes"],
        training=tuple(memory),
    )


def _serving(folder: Path, report: Callable[[float], object]) -> dict[str, Any]:
    options = [word for rows in ROWS for word in ("--rows", str(rows))]
    # A line for the prompt, for each number of rows, and for all figures.
    lines = 2 + len(ROWS)

    def tick(seen: int) -> None:
        report(min(seen / lines, 1.0))

    command = [sys.executable, "-m", "inference_service", "measure", str(folder), *options]
    figures: dict[str, Any] = json.loads(last_line(command, {}, tick, "The speed of serving cannot be measured"))
    return figures


def _training(config: TrainingConfig, threads: int, timed: bool, tick: Callable[[], object]) -> dict[str, Any]:
    command = [sys.executable, "-m", "trainer_service.evaluation.speed", json.dumps(config.to_dict())]
    purpose = f"Training with a batch size of {config.batch_size} cannot be measured"
    environment = {"OMP_NUM_THREADS": str(threads)}

    def ticks(_: int) -> None:
        tick()

    figures: dict[str, Any] = json.loads(last_line([*command, *["timed"] * timed], environment, ticks, purpose))
    return figures


def batch_sizes(largest: int) -> list[int]:
    """Returns the batch sizes whose memory is measured: the powers of two below the largest one, and that one."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def main() -> None:
    """Measures training with the configuration in the first argument, its speed only with a second argument; prints
    JSON."""
    end_without_reader()
    cache = read_directories(os.environ).cache
    device = accelerator.prepare(cache / "trainer")
    # Brings MLX in, so not before the accelerator is prepared.
    from trainer_service.evaluation.training_steps import measure_steps

    config = TrainingConfig.from_dict(json.loads(sys.argv[1]))
    print(json.dumps(asdict(measure_steps(config, device, timed=len(sys.argv) > 2))))


if __name__ == "__main__":
    cli.end(main)
