"""Measures one training run on several processes, one a GPU or over a ring of CPU processes:
python -m tests.benchmarks.scaling --help"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from shared.service import cli
from shared.service.listening import free_port_numbers
from tests.benchmarks.side_by_side import ROOT, cores, print_table
from tests.ring_processes import ring
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    ranks: Annotated[int, typer.Option(help="Processes, compared with one.")] = 2,
    preset: str = "tinystories-53m",
    rows: Annotated[int, typer.Option(help="Rows of a process; strong scaling divides as many among all.")] = 64,
    rounds: int = 5,
    steps: Annotated[int, typer.Option(help="Steps of a round.")] = 6,
    cpu: Annotated[bool, typer.Option(help="Computes on the CPU, over a ring on the loopback interface.")] = False,
    training: Annotated[bool, typer.Option(help="Measures steps, not only collectives.")] = True,
    limit_s: Annotated[float, typer.Option(help="The time after which a measurement is given up.")] = 200.0,
) -> None:
    """Print tables of training on one process and on several, and of collectives alone; then one line of JSON."""
    values = find_preset(preset).to_dict() | {"dropout": 0.0}
    task = {"config": values, "rounds": rounds, "steps": steps, "training": training, "cpu": cpu}
    alone, together = task | {"batches": [rows]}, task | {"batches": [rows * ranks, rows]}
    results = {count: _measure(count, each, cpu, limit_s) for count, each in ((1, alone), (ranks, together))}
    _print(results, int(str(values["context_length"])))
    rounded = {
        count: {
            "start_s": round(first["start_s"], 2),
            **{kind: [_rounded(each) for each in first[kind]] for kind in ("training", "collectives")},
        }
        for count, (first, *_) in results.items()
    }
    print(json.dumps(rounded))


def _measure(count: int, task: dict[str, Any], cpu: bool, limit_s: float) -> list[dict[str, Any]]:
    """Returns what each of `count` processes has measured."""
    with tempfile.TemporaryDirectory() as folder, ring(count, Path(folder)) as ring_environments:
        (port,) = free_port_numbers(1)
        processes = []
        for rank, environment in enumerate(ring_environments):
            if cpu:
                environment |= {"OMP_NUM_THREADS": str(max(cores() // count, 1)), "CUDA_VISIBLE_DEVICES": ""}
            else:
                del environment["MLX_HOSTFILE"]
                environment |= {"MLX_WORLD_SIZE": str(count), "NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(port)}
                environment |= {"CUDA_VISIBLE_DEVICES": str(rank)}
            specification = json.dumps(task | {"count": count, "started_s": time.time()})
            command = [sys.executable, "-m", "tests.benchmarks.scaling_rank", specification]
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
            )
        ends_s = time.monotonic() + limit_s
        try:
            outputs = [process.communicate(timeout=max(ends_s - time.monotonic(), 0.1))[0] for process in processes]
        except subprocess.TimeoutExpired:
            raise SystemExit(f"{count} processes have not ended within {limit_s:.0f} s.") from None
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    if failed := [process.returncode for process in processes if process.returncode]:
        raise SystemExit(f"A process ended with exit code {failed[0]}.")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _print(results: Mapping[int, Sequence[Mapping[str, Any]]], context_length: int) -> None:
    (one,), *_ = results.values()
    base = one["training"][0]["tokens_per_s"] if one["training"] else 1.0
    rows = []
    for count, measured in results.items():
        first = measured[0]
        for number, each in enumerate(first["training"]):
            memory = max(rank["training"][number]["peak_bytes"] for rank in measured)
            rows.append(
                [
                    str(count),
                    f"{each['batch_size']}x{context_length}",
                    each["sum"],
                    f"{each['step_ms']:,.1f} ms",
                    f"{each['tokens_per_s']:,.0f}",
                    f"{each['tokens_per_s'] / base:.2f}",
                    f"{each['spread']:.0%}",
                    f"{each['loss']:.4f}",
                    f"{memory / 2**30:.2f} GiB",
                    f"{first['start_s']:.1f} s",
                    f"{each['first_step_s']:.1f} s",
                ]
            )
    if rows:
        columns = ["processes", "batch", "sum", "step", "tokens/s", "ratio", "spread", "last loss", "peak memory"]
        print_table([*columns, "start", "first step"], rows)
        print()
    last = [measured[0] for measured in results.values()][-1]
    columns = ["collective", "median", "fastest", "slowest", "GB/s"]
    times = ("median_ms", "least_ms", "most_ms")
    print_table(
        columns,
        [
            [each["what"], *(f"{each[key]:,.2f} ms" for key in times), f"{each['gb_per_s']:.1f}"]
            for each in last["collectives"]
        ],
    )


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}


if __name__ == "__main__":
    cli.run(app)
