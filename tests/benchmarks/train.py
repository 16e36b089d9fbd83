"""Training steps side by side with PyTorch and plain MLX: python -m tests.benchmarks.train --help"""

import itertools
from typing import Annotated

import typer

from tests.benchmarks.side_by_side import cores, measure, print_table
from trainer_service.presets import PRESETS


def main(
    preset: Annotated[list[str], typer.Option(help="Repeatable.")] = ["tinystories-53m", "small", "demo"],  # noqa: B006
    rows: Annotated[list[int], typer.Option(help="Rows of a batch, 0 for the preset's own. Repeatable.")] = [0],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Repeatable; the first is the measure of the others.")] = [  # noqa: B006
        "pytorch eager",
        "mlx-lm",
        "gptloop",
    ],
    rounds: int = 5,
    steps: int = 1,
    dropout: Annotated[float, typer.Option(help="Below 0: the preset's own.")] = -1.0,
) -> None:
    """Print a table of tokens per second, peak memory and the ratio to the first peer, for each preset."""
    print(f"{cores()} cores")
    table = []
    for name, wanted in itertools.product(preset, rows):
        config = PRESETS[name]
        values = config.to_dict() | ({"dropout": dropout} if dropout >= 0 else {})
        batch = wanted or config.batch_size
        results = measure("Training", peer, {"config": values, "rows": batch}, rounds=rounds, steps=steps)
        first = results[peer[0]].step_s
        for one, result in results.items():
            table.append(
                [
                    f"{name} {batch}x{config.context_length}",
                    one,
                    f"{result.step_s * 1e3:,.1f} ms",
                    f"{batch * config.context_length / result.step_s:,.0f}",
                    f"{first / result.step_s:.2f}",
                    f"{result.spread:.0%}",
                    f"{result.peak_bytes / 2**30:.2f} GiB",
                ]
            )
    print_table(["model", "implementation", "step", "tokens/s", "ratio", "spread", "peak memory"], table)


if __name__ == "__main__":
    typer.run(main)
