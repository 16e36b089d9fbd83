"""Compares closed-loop generation in the engine and over gRPC: python -m tests.benchmarks.engine --help"""

import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer

from shared.errors import InvalidArgument
from shared.service import cli
from tests.benchmarks.checkpoint import Checkpoint
from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.implementations import Implementation, find_implementations
from tests.benchmarks.server import Server
from tests.benchmarks.setup import Setup, limit_threads
from tests.benchmarks.side_by_side import Measured, cores, measure, print_table
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

MEASURABLE = ("gptloop-engine", "gptloop-grpc", "gptloop-http", "mlx-lm-batch", "ctranslate2", "pytorch")
# Each is measured right after the one before it, so that both run in the same conditions.
FACES = ("gptloop-engine", "gptloop-grpc", "gptloop-http")


@app.command()
def main(
    preset: Annotated[str, typer.Option(help="The shape of the model; weights are random, the head is tied.")] = (
        "tinystories-53m"
    ),
    rows: Annotated[list[int], typer.Option(min=1, help="Requests that decode together. Repeatable.")] = [1, 8, 32],  # noqa: B006
    peer: Annotated[list[str], typer.Option(help="Repeatable; ratios are relative to the first.")] = [  # noqa: B006
        "mlx-lm-batch",
        "ctranslate2",
        "ctranslate2 int8",
        "gptloop-engine fp32",
        "gptloop-engine",
        "gptloop-grpc",
        "gptloop-http",
    ],
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 16,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens that each request generates.")] = 64,
    slots: Annotated[int, typer.Option(min=2, help="Slots of the engine, at least as many as rows.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each implementation.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 7,
    duration: Annotated[float, typer.Option(min=0, help="Least seconds of each implementation in each round.")] = 3,
) -> None:
    """Print tokens per second if all requests start together, and start again when all of them have ended.

    gptloop-engine is the engine with its thread and its outbox; gptloop-grpc and gptloop-http are the real server,
    called by a client in another process. mlx-lm-batch is mlx-lm's BatchGenerator. ctranslate2 and pytorch compute in
    fp32, or "ctranslate2 int8" with int8 weights, a whole batch at once, and do not stream; "pytorch graph" does so in
    bf16, with a CUDA graph for each step on an NVIDIA GPU, and draws too. gptloop draws at its default temperature,
    0.8, with weights as GPTLOOP_INFERENCE_WEIGHTS says, or "gptloop-engine fp32" in fp32; the others and
    "gptloop-engine greedy" take the likeliest token. The time of a step is the whole time, with prompts, divided by the
    tokens of one request.

    In each round gptloop-engine, gptloop-grpc and gptloop-http are measured one after the other. So they show what gRPC
    adds to the engine, and what HTTP adds to gRPC.

    Example: python -m tests.benchmarks.engine --preset demo --rows 4 --peer gptloop-engine --peer gptloop-grpc
    """
    chosen = find_implementations(peer, MEASURABLE)
    config = find_preset(preset).gpt
    if prompt_tokens + output_tokens > config.context_length:
        raise InvalidArgument(
            f"{prompt_tokens} prompt tokens and {output_tokens} output tokens exceed the context of {preset}, "
            f"{config.context_length} tokens."
        )
    # SIGTERM ends the child processes, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    limit_threads(threads)
    print(f"{cores()} cores, {threads} threads each; {prompt_tokens} prompt tokens, {output_tokens} output tokens")
    results = []
    with TemporaryDirectory(prefix="gptloop-bench-") as folder:
        for_ctranslate2 = any("ctranslate2" in each.packages for each in chosen)
        checkpoint = Checkpoint.make(Path(folder), preset, for_ctranslate2=for_ctranslate2)
        for count in rows:
            work = ClosedLoop(count, prompt_tokens, output_tokens, config.vocabulary_size)
            results.append((work, _measure(work, chosen, checkpoint, max(slots, count), threads, rounds, duration)))
    _print_speeds(preset, results, {each.name: each.draws for each in chosen})
    for bare, face in pairwise(each for each in FACES if each in {one.name for one in chosen}):
        print(cost_of(face, bare, results))


def _measure(
    work: ClosedLoop,
    chosen: Sequence[Implementation],
    checkpoint: Checkpoint,
    slots: int,
    threads: int,
    rounds: int,
    least_s: float,
) -> dict[str, Measured]:
    """Measures each implementation in its own process, in turn; starts a server if one of them needs it."""
    names = [each.name for each in chosen]
    log = checkpoint.folder / "server.log"
    needs_server = bool({*FACES[1:]} & {*names})
    with Server(checkpoint, slots=slots, threads=threads, log=log) if needs_server else nullcontext() as server:
        setup = Setup(str(checkpoint.folder), slots, threads, None if server is None else server.endpoint)
        specification = {"setup": asdict(setup), "work": asdict(work)}
        measured = measure("Generation", in_turn(names), specification, rounds=rounds, steps=1, least_s=least_s)
    return {name: measured[name] for name in names}


def in_turn(names: Sequence[str]) -> list[str]:
    """Returns the names with the faces of the engine one after the other, in the place of the first."""
    faces = [name for name in FACES if name in names]
    others = [name for name in names if name not in faces[1:]]
    after = others.index(faces[0]) + 1 if faces else 0
    return [*others[:after], *faces[1:], *others[after:]]


def cost_of(face: str, bare: str, results: Sequence[tuple[ClosedLoop, dict[str, Measured]]]) -> str:
    """Returns a sentence about what a face adds to a step of a barer one in the same round, as the median of all rounds
    with quartiles."""
    costs = []
    for work, measured in results:
        bare_s, streamed_s = (np.array(measured[name].rounds_s) for name in (bare, face))
        lower, middle, upper = 100 * (np.percentile(streamed_s / bare_s, (25, 50, 75)) - 1)
        costs.append(f"{middle:.1f} % ({lower:.1f} to {upper:.1f}) at x{work.rows}")
    return f"{face} adds to {bare}, in the median round (quartiles): {', '.join(costs)}."


def _print_speeds(preset: str, results: list[tuple[ClosedLoop, dict[str, Measured]]], draws: dict[str, str]) -> None:
    rows = []
    for work, measured in results:
        first = next(iter(measured.values())).step_s
        rows += [
            [
                f"{preset} x{work.rows}",
                name,
                draws[name],
                f"{1e3 * each.step_s / work.output_tokens:,.1f} ms",
                f"{work.rows * work.output_tokens / each.step_s:,.0f}",
                f"{first / each.step_s:.2f}",
                f"{each.spread:.0%}",
                f"{each.peak_bytes / 2**30:.2f} GiB",
            ]
            for name, each in measured.items()
        ]
    print_table(["model", "implementation", "draws", "step", "tokens/s", "ratio", "spread", "memory"], rows)


if __name__ == "__main__":
    cli.run(app)
