"""Measures the speed and the memory of a version on this machine, in serving and in training.

Both are measured in processes of their own, so that neither the memory of this one nor its compiled programs count, and
the work can be ended at any moment. `python -m trainer_service.evaluation.speed` is the process that trains.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from shared.device import accelerator
from shared.service import cli
from shared.service.reader import end_without_reader
from shared.service.settings import read_directories
from trainer_service.child_process import last_line
from trainer_service.evaluation.record import DecodingSpeed, Memory, Speed, TrainingMemory
from trainer_service.training.config import TrainingConfig

# The numbers of requests at once.
ROWS = (1, 8, 32)
# The share of the work that serving is.
_SERVING_SHARE = 0.5

_DECODING = TypeAdapter(tuple[DecodingSpeed, ...])
_TRAINING_MEMORY = TypeAdapter(tuple[TrainingMemory, ...])


def measure_speed(
    folder: Path, config: TrainingConfig, threads: int, report: Callable[[float], object]
) -> tuple[Speed, Memory]:
    """Measures the version in a folder, which was trained with `config`.

    On a CPU, training takes `threads` threads, and serving as many as the inference service is set to.

    `report` receives the share that is done, several times a second; an exception from it ends the work. Raises
    `FailedPrecondition` if a process fails, for example because memory is short.
    """

    def progress(first: float, last: float, parts: int) -> Callable[[int], None]:
        def tick(lines: int) -> None:
            report(first + (last - first) * min(lines / parts, 1.0))

        return tick

    # The processes need what this one has freed.
    accelerator.release_memory()
    options = [word for rows in ROWS for word in ("--rows", str(rows))]
    served = json.loads(
        last_line(
            [sys.executable, "-m", "inference_service", "measure", str(folder), *options],
            {},
            progress(0.0, _SERVING_SHARE, 2 + len(ROWS)),
            "The speed of serving cannot be measured",
        )
    )
    trained = json.loads(
        last_line(
            [sys.executable, "-m", "trainer_service.evaluation.speed", json.dumps(config.to_dict())],
            {"OPENBLAS_NUM_THREADS": str(threads)},
            progress(_SERVING_SHARE, 1.0, 2 + len(batch_sizes(config.batch_size))),
            "The speed of training cannot be measured",
        )
    )
    report(1.0)
    speed = Speed(
        device=served["device"],
        threads=trained["threads"],
        training_rows=trained["rows"],
        training_tokens_per_s=trained["tokens_per_s"],
        prefill_tokens_per_s=served["prefill_tokens_per_s"],
        decoding=_DECODING.validate_python(served["decoding"]),
        serving_threads=served["threads"],
    )
    memory = Memory(
        weights_bytes=served["weights_bytes"],
        optimizer_bytes=trained["optimizer_bytes"],
        cache_bytes_per_token=served["cache_bytes_per_token"],
        serving_bytes=served["memory_bytes"],
        training=_TRAINING_MEMORY.validate_python(trained["memory"]),
    )
    return speed, memory


def batch_sizes(largest: int) -> list[int]:
    """Returns the batch sizes whose memory is measured: the powers of two below the largest one, and that one."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def main() -> None:
    """Measures training with the configuration in the first argument; prints a line for each part, and JSON at last."""
    end_without_reader()
    cache = read_directories(os.environ).cache
    device = accelerator.prepare(cache / "trainer", own_threads=True)
    # Brings MLX in, so not before the accelerator is prepared.
    from trainer_service.evaluation.training_steps import measure_steps

    config = TrainingConfig.from_dict(json.loads(sys.argv[1]))
    measured = measure_steps(config, batch_sizes(config.batch_size), device, lambda line: print(line, flush=True))
    print(json.dumps(asdict(measured)))


if __name__ == "__main__":
    cli.end(main)
