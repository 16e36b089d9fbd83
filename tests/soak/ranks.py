"""Kills a run of two ranks at random moments, and compares its end with an uninterrupted run, within fp32's tolerance.

`python -m tests.soak.ranks --kills 30`
"""

import random
from typing import Annotated

import numpy as np
import typer

from shared.service import cli
from tests.end_to_end.conftest import Result, System, children
from tests.soak.kills import Target, damages, programs, soak, with_training

# What two ranks add in another order than one may differ by this, relative to the largest number of an array.
_TOLERANCE = 1e-4


def ranks(system: System, numbers: random.Random) -> list[int]:
    """Returns the ranks, which the process that the worker has started has started."""
    return [rank for pid in with_training()(system, numbers) for rank in children(pid)]


def a_rank(system: System, numbers: random.Random) -> list[int]:
    """Returns one of them, if any runs."""
    found = ranks(system, numbers)
    return [numbers.choice(found)] if found else []


TARGETS: dict[str, Target] = {
    "a rank": a_rank,
    "all ranks": ranks,
    "coordinator": with_training(),
    "worker": programs("worker"),
    "Redis": programs("redis"),
    "worker, ranks and Redis": lambda system, numbers: (
        with_training("worker", "redis")(system, numbers) + ranks(system, numbers)
    ),
}


def check(system: System, job: str, reference: Result) -> list[str]:
    """Returns what is missing, damaged or further from the uninterrupted run than the tolerance."""
    result = system.result(job)
    if result.last_step != reference.last_step or result.state.keys() != reference.state.keys():
        return ["The last state is not that of the uninterrupted run."]
    differences = {name: difference(result.state[name], reference.state[name]) for name in result.state}
    name = max(differences, key=lambda each: differences[each])
    print(f"largest difference: {differences[name]:.1e}, in {name}")
    far = [f"{name} differs by {each:.1e}." for name, each in differences.items() if not each <= _TOLERANCE]
    return far + damages(system, result, reference)


def difference(first: bytes, second: bytes) -> float:
    """Returns the largest difference of two arrays of fp32, relative to the largest number of the second."""
    one, other = (np.frombuffer(each, np.float32) for each in (first, second))
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(other)), 1e-30))


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    kills: Annotated[int, typer.Option(min=1, help="The number of kills.")] = 30,
    seed: Annotated[int | None, typer.Option(help="Seed of the targets and the steps; random by default.")] = None,
) -> None:
    if soak(kills, seed, check, TARGETS, world_size="2", evaluation_interval="10"):
        raise typer.Exit(1)
    print("Nothing was lost, and the end of the run is that of the uninterrupted run within the tolerance.")


if __name__ == "__main__":
    cli.run(app)
