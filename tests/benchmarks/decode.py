"""Compares decode steps with PyTorch and plain MLX: python -m tests.benchmarks.decode --help"""

import os
from typing import Annotated

import typer

from shared.service import cli
from tests.benchmarks.floor import Machine
from tests.benchmarks.side_by_side import Task, cores, measure, print_results
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    preset: Annotated[str, typer.Option()] = "tinystories-53m",
    rows: Annotated[list[int], typer.Option(help="Repeatable.")] = [1, 8, 32],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Repeatable; ratios are relative to the first.")] = [  # noqa: B006
        "pytorch",
        "mlx-lm",
        "gptloop",
        "gptloop greedy",
        "gptloop forward",
    ],
    rounds: int = 5,
    steps: Annotated[
        int, typer.Option(help="Steps in a round: a multiple of 8 on an NVIDIA GPU, which takes eight at a time.")
    ] = 16,
) -> None:
    """Print a table of a step's time, tokens per second, the ratio to the first peer and the share of the floor,
    starting at half a context.

    gptloop draws at temperature 0.8, the others take the likeliest token; `gptloop forward` draws nothing. For an
    NVIDIA GPU: `pytorch graph`, which draws too, and `gptloop mlx`, without kernels of our own.
    """
    # gptloop decodes on one core, like its server.
    os.environ["OMP_NUM_THREADS"] = "1"
    config = find_preset(preset)
    machine = Machine.measured()
    print(f"{cores()} cores, {machine}")
    tasks = []
    for count in rows:
        position = config.context_length // 2
        specification = {"config": config.to_dict(), "rows": count, "position": position}
        peers = measure("Decoding", peer, specification, rounds=rounds, steps=steps)
        tasks.append(Task(f"{preset} x{count}", count, machine.decode_s(config.gpt, count, position), peers))
    print_results(tasks)


if __name__ == "__main__":
    cli.run(app)
