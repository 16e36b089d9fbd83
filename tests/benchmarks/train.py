"""Compares training steps with PyTorch and plain MLX: python -m tests.benchmarks.train --help"""

import itertools
from typing import Annotated

import typer

from shared.service import cli
from tests.benchmarks.floor import Machine
from tests.benchmarks.side_by_side import Task, cores, measure, print_results
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    preset: Annotated[list[str], typer.Option(help="Repeatable.")] = ["tinystories-53m", "small", "demo"],  # noqa: B006
    rows: Annotated[list[int], typer.Option(help="Rows of a batch; 0 means the preset's. Repeatable.")] = [0],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Repeatable; ratios are relative to the first.")] = [  # noqa: B006
        "pytorch compiled",
        "mlx-lm",
        "gptloop adamw",
        "gptloop",
    ],
    rounds: int = 5,
    steps: int = 1,
    dropout: Annotated[float, typer.Option(help="A negative value means the preset's.")] = -1.0,
) -> None:
    """Print a table of tokens per second, the ratio to the first peer, the share of the floor and peak memory."""
    configs = {name: find_preset(name) for name in preset}
    machine = Machine.measured()
    print(f"{cores()} cores, {machine}")
    tasks = []
    for (name, config), wanted in itertools.product(configs.items(), rows):
        values = config.to_dict() | ({"dropout": dropout} if dropout >= 0 else {})
        batch = wanted or config.batch_size
        peers = measure("Training", peer, {"config": values, "rows": batch}, rounds=rounds, steps=steps)
        label, tokens = f"{name} {batch}x{config.context_length}", batch * config.context_length
        tasks.append(Task(label, tokens, machine.training_s(config.gpt, batch), peers))
    print_results(tasks)


if __name__ == "__main__":
    cli.run(app)
