"""The least time that a step can take: its products at the speed of large products, or its bytes at that of a copy."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from shared.gpt.config import GPTConfig


@dataclass(frozen=True)
class Machine:
    """The speed of this machine.

    `flops`: those of products of large matrices per second; `bytes_per_s`: bytes that a copy reads and writes;
    `bytes_per_number`: 2 in bf16 on an NVIDIA GPU, else 4.
    """

    flops: float
    bytes_per_s: float
    bytes_per_number: int

    @classmethod
    def measured(cls) -> "Machine":
        """Measures with PyTorch in another process: in bf16 on an NVIDIA GPU, else in fp32 on all of its cores."""
        answer = subprocess.run([sys.executable, "-m", "tests.benchmarks.floor"], capture_output=True, check=True)
        return cls(*json.loads(answer.stdout))

    def __str__(self) -> str:
        return f"products {self.flops / 1e9:,.0f} GFLOP/s, copies {self.bytes_per_s / 1e9:,.0f} GB/s"

    def training_s(self, config: GPTConfig, rows: int) -> float:
        """Returns the seconds of a training step on `rows` whole contexts: six operations for each weight of a product
        and each token (Kaplan et al. 2020, section 2.1), and attention to the earlier tokens."""
        T, C = config.context_length, config.width
        attention = config.layers * 6 * T * C  # two products of 2 x T/2 x C, forward, and twice that backward
        return rows * T * (6 * _weights(config) + attention) / self.flops

    def decode_s(self, config: GPTConfig, rows: int, position: int) -> float:
        """Returns the seconds of a decode step, which reads every weight, key and value."""
        C = config.width
        cached = 2 * config.layers * position * C
        operations = 2 * rows * (_weights(config) + cached)
        read = self.bytes_per_number * (_weights(config) + rows * cached)
        return max(operations / self.flops, read / self.bytes_per_s)


def _weights(config: GPTConfig) -> int:
    """Returns the number of weights in all products."""
    C = config.width
    return config.layers * (4 * C * C + 2 * C * config.hidden_width) + config.vocabulary_size * C


def main() -> None:
    import torch

    from tests.benchmarks.side_by_side import cores

    on_gpu = torch.cuda.is_available()
    torch.set_num_threads(cores())
    device, kind, size = ("cuda", torch.bfloat16, 8192) if on_gpu else ("cpu", torch.float32, 2048)
    matrix = torch.ones((size, size), dtype=kind, device=device)
    source = torch.ones(1 << (30 if on_gpu else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best_s(work: Callable[[], object]) -> float:
        times = []
        for _ in range(10):
            start_s = time.perf_counter()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start_s)
        return min(times)

    flops = 2 * size**3 / best_s(lambda: matrix @ matrix)
    print(json.dumps([flops, 2 * source.numel() / best_s(lambda: target.copy_(source)), matrix.itemsize]))


if __name__ == "__main__":
    main()
