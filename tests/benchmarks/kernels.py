"""Measures each kernel of a decode step on an NVIDIA GPU: python -m tests.benchmarks.kernels --help"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.cuda.program import supports
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.device.cuda_driver import CudaDriver, Kernel
from shared.errors import FailedPrecondition
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from shared.service import cli
from tests.benchmarks.floor import Machine
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_ROUNDS = 20


@app.command()
def main(
    preset: Annotated[str, typer.Option()] = "tinystories-53m",
    rows: Annotated[list[int], typer.Option(min=1, max=1024, help="Repeatable.")] = [1, 8, 64, 256],  # noqa: B006
) -> None:
    """Print the kernels of a step with its draw at half a context, the time of each, and its floor: its bytes at the
    speed of a copy, or its products at that of large products.

    The time is that of one kernel after the other, as in a step. The last lines are the whole step, and a kernel that
    does nothing.
    """
    config = find_preset(preset).gpt
    if not (mx.cuda.is_available() and supports(config)):
        raise FailedPrecondition(
            "This measures our kernels for an NVIDIA GPU: it needs one, and a preset that they take."
        )
    machine = Machine.measured()
    print(machine)
    for count in rows:
        print(f"\n{preset} x{count}\n")
        print_table(["kernel", "in a step", "each", "together", "floor", "of floor"], _measure(config, count, machine))


@dataclass(frozen=True)
class _Launch:
    name: str
    arguments: tuple[Any, ...]


class _RecordingDriver(CudaDriver):
    """A GPU that remembers what is launched."""

    def __init__(self) -> None:
        cache = ROOT / ".pytest_cache" / "benchmarks"
        cache.mkdir(parents=True, exist_ok=True)
        super().__init__(cache)
        self.launches: list[_Launch] = []
        self._names: dict[int, str] = {}

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        find = super().load(source, constants)

        def kernel(name: str) -> Kernel:
            found = find(name)
            self._names[id(found)] = name
            return found

        return kernel

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: Any) -> None:
        copied = type(argument).from_buffer_copy(argument)
        self.launches.append(_Launch(self._names[id(kernel)], (kernel, grid, threads, copied)))
        super().launch(kernel, grid, threads, argument)

    def start(self, launches: list[_Launch]) -> None:
        """Starts what was launched before, one after the other."""
        for each in launches:
            super().launch(*each.arguments)


def _measure(config: GPTConfig, rows: int, machine: Machine) -> list[list[str]]:
    mx.random.seed(1)
    model = GPT(config)
    model.eval()
    mx.eval(model.parameters())
    gpu = _RecordingDriver()
    decoder = CudaDecoder(model, max(2, rows), gpu)
    position = config.context_length // 2
    tokens = np.random.default_rng(1).integers(config.vocabulary_size, size=position).tolist()
    for slot in range(rows):
        for start in range(0, position, SPAN_TOKENS):
            decoder.forward([Span(slot, start, tuple(tokens[start : start + SPAN_TOKENS]))])
    drawn = [DecodeRow(slot, position, 0, 0.8, seed=slot, drawn=0, masked=0, masked_draws=0) for slot in range(rows)]

    # The first call records the launches of a step; the second leaves draws for as many steps as there can be.
    gpu.launches.clear()
    decoder.decode(drawn, 1)
    step = list(gpu.launches)
    decoder.decode(drawn, MAX_DECODE_STEPS)

    def graph_s(launches: list[_Launch], copies: int) -> float:
        graph = gpu.record(lambda: gpu.start(launches * copies))
        times = []
        for _ in range(_ROUNDS):
            decoder.decode(drawn, 1)
            start_s = time.perf_counter()
            gpu.replay(graph)
            gpu.wait()
            times.append(time.perf_counter() - start_s)
        return float(np.median(times))

    def seconds(launches: list[_Launch]) -> float:
        """Returns the seconds that some launches take among others: the difference between graphs with many copies and
        with one."""
        # One step of the draws is taken before.
        copies = MAX_DECODE_STEPS - 1
        return (graph_s(launches, copies) - graph_s(launches, 1)) / (copies - 1)

    table, least_s = [], 0.0
    floors = floors_of(config, rows, position, machine)
    for name in dict.fromkeys(each.name for each in step):
        same = [each for each in step if each.name == name]
        floor_s = len(same) * next(floors[kind] for kind in floors if name.startswith(kind))
        least_s += floor_s
        table.append(_line(name, len(same), seconds(same), floor_s))
    table.append(_line("the step", 1, seconds(step), least_s))
    idle = next(each for each in step if each.name == "normalise_wanted")
    idle.arguments[-1].wanted = no_row = gpu.allocate(rows * 8 * 4)
    gpu.write(no_row, np.full(rows * 8 * 4, 0xFF, np.uint8))
    table.append(_line("one that does nothing", 1, seconds([idle]), 0.0))
    return table


def floors_of(config: GPTConfig, rows: int, position: int, machine: Machine) -> dict[str, float]:
    """Returns the least seconds of each kernel, by the start of its name: those of what it reads and writes of memory,
    or of its operations."""
    C, F, V = config.width, config.hidden_width, config.vocabulary_size

    def least_s(number_bytes: int, operations: int = 0) -> float:
        return max(number_bytes / machine.bytes_per_s, operations / machine.flops)

    def product_s(inputs: int, outputs: int, row_bytes: int) -> float:
        return least_s(2 * inputs * outputs + rows * row_bytes, 2 * rows * inputs * outputs)

    return {
        "embed": least_s(rows * C * 8),
        "qkv": product_s(C, 3 * C, 4 * C + 4 * C + 4 * C),
        "attend": least_s(rows * (4 * C * position + 6 * C), 4 * rows * C * position),
        "attention_output": product_s(C, C, 2 * C + 8 * C),
        "up": product_s(C, F, 4 * C + 2 * F),
        "down": product_s(F, C, 2 * F + 8 * C),
        "normalise": least_s(rows * C * 6),
        "head": product_s(C, V, 2 * C + 4 * V),
        "sum_ranges": least_s(rows * V * 4),
        "draw": least_s(rows * 1024),
    }


def _line(name: str, count: int, seconds: float, floor_s: float) -> list[str]:
    each, together, floor = (f"{1e6 * value:.1f} µs" for value in (seconds / count, seconds, floor_s))
    return [name, str(count), each, together, floor, f"{floor_s / seconds:.0%}"]


if __name__ == "__main__":
    cli.run(app)
