"""Decode steps side by side with PyTorch and plain MLX: python -m tests.benchmarks.decode --help"""

import os
from typing import Annotated

import typer

from tests.benchmarks.side_by_side import cores, measure, print_results
from trainer_service.presets import PRESETS


def main(
    preset: Annotated[str, typer.Option()] = "tinystories-53m",
    rows: Annotated[list[int], typer.Option(help="Repeatable.")] = [1, 8, 32],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Repeatable; the first is the measure of the others.")] = [  # noqa: B006
        "pytorch",
        "mlx-lm",
        "gptloop",
        "gptloop greedy",
        "gptloop forward",
    ],
    rounds: int = 5,
    steps: int = 10,
) -> None:
    """Print a table of a step's time, tokens per second and the ratio to the first peer, from half a context on.

    gptloop draws at temperature 0.8, the others take the likeliest token; `gptloop forward` draws nothing.
    """
    # gptloop decodes on one core, as its server does.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    config = PRESETS[preset]
    print(f"{cores()} cores")
    results = []
    for count in rows:
        specification = {"config": config.to_dict(), "rows": count, "position": config.context_length // 2}
        peers = measure("Decoding", peer, specification, rounds=rounds, steps=steps)
        results.append((f"{preset} x{count}", count, peers))
    print_results(results)


if __name__ == "__main__":
    typer.run(main)
