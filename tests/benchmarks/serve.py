"""Compares the inference server under load with mlx-lm's BatchGenerator: python -m tests.benchmarks.serve --help"""

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from shared.service import cli
from tests.benchmarks.checkpoint import Checkpoint
from tests.benchmarks.implementations import Implementation, find_implementations, require_installed
from tests.benchmarks.player import Player
from tests.benchmarks.recording import Recording
from tests.benchmarks.schedule import Lengths, Traffic
from tests.benchmarks.server import Server
from tests.benchmarks.setup import Setup, limit_threads
from tests.benchmarks.side_by_side import ROOT, cores
from tests.benchmarks.summary import Summary, print_summaries
from trainer_service.presets import find_preset

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

MEASURABLE = ("gptloop-grpc", "mlx-lm-batch")
# With this, one length in twenty is 2.7 times the median or more.
SIGMA = 0.6
SHORTEST = 4
# Requests before the first rate of each implementation, which do not count.
WARM_UP = 16


@dataclass(frozen=True)
class Plan:
    """The plan of the measurement: requests arrive for `duration_s` at each rate, for each implementation in turn."""

    preset: str
    implementations: tuple[Implementation, ...]
    rates_per_s: tuple[float, ...]
    duration_s: float
    traffic: Traffic
    slots: int
    threads: int
    cores: int

    def __str__(self) -> str:
        draws = ", ".join(f"{each.name}: {each.draws}" for each in self.implementations)
        return (
            f"{self.preset}, {self.cores} cores, {self.threads} threads and {self.slots} slots each; medians of "
            f"{self.traffic.prompt.median} prompt and {self.traffic.output.median} output tokens; {draws}"
        )


@app.command()
def main(
    preset: Annotated[str, typer.Option(help="The shape of the model; weights are random, the head is tied.")] = (
        "tinystories-53m"
    ),
    peer: Annotated[list[str], typer.Option(help="Repeatable.")] = ["gptloop-grpc", "mlx-lm-batch"],  # noqa: B006
    rate: Annotated[list[float], typer.Option(min=0.001, help="Requests that arrive a second. Repeatable.")] = [  # noqa: B006
        1,
        2,
        4,
        8,
    ],
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds in which requests arrive, at each rate.")] = 30,
    limit: Annotated[float, typer.Option(min=0.1, help="Seconds after which a request is cancelled.")] = 180,
    prompt_tokens: Annotated[
        int, typer.Option(min=0, help="Median of the prompts' lengths; 0: an eighth of the context.")
    ] = 0,
    output_tokens: Annotated[
        int, typer.Option(min=0, help="Median of the answers' lengths; 0: an eighth of the context.")
    ] = 0,
    slots: Annotated[int, typer.Option(min=2, help="Requests that decode together.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of each implementation.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the arrivals, lengths and prompts for all.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results.json, the charts and the server's log.")] = (
        ROOT / "var" / "bench" / "serve"
    ),
) -> None:
    """Print rates and latencies of requests that arrive at a rate, whether or not earlier ones have ended.

    Arrivals are a Poisson process; lengths are log-normal, up to half a context. All implementations get the same
    requests, and each request gets exactly the tokens that it wants. gptloop-grpc is the real server, called over gRPC
    from another process. mlx-lm-batch is mlx-lm's BatchGenerator, which takes requests in its own process, without
    gRPC. The first draws at temperature 0.8; the second takes the likeliest token.

    At a rate above the capacity of an implementation, its queue grows as long as requests arrive, and so do the times
    to the first token. Choose rates below and above this capacity.

    Example: python -m tests.benchmarks.serve --preset demo --rate 5 --rate 20 --duration 10
    """
    require_installed(["matplotlib"])
    config = find_preset(preset).gpt
    longest = config.context_length // 2
    prompts, outputs = (
        Lengths(min(median or config.context_length // 8, longest), SIGMA, SHORTEST, longest)
        for median in (prompt_tokens, output_tokens)
    )
    plan = Plan(
        preset,
        find_implementations(peer, MEASURABLE),
        tuple(rate),
        duration,
        Traffic(prompts, outputs, limit, config.vocabulary_size, seed),
        slots,
        threads,
        cores(),
    )
    # SIGTERM ends the child processes, like Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    out.mkdir(parents=True, exist_ok=True)
    runs = list(measure(plan, out / "server.log"))
    print(plan)
    print_summaries([summary for summary, _ in runs])
    write(plan, runs, out)


def measure(plan: Plan, log: Path) -> Iterator[tuple[Summary, Recording]]:
    """Measures all implementations at the first rate, then at the next; their processes live through all rates."""
    limit_threads(plan.threads)
    names = [each.name for each in plan.implementations]
    with TemporaryDirectory(prefix="gptloop-bench-") as folder, ExitStack() as stack:
        _say("Writing the model and starting the processes.")
        checkpoint = Checkpoint.make(Path(folder), plan.preset)
        endpoint = None
        if "gptloop-grpc" in names:
            server = stack.enter_context(Server(checkpoint, slots=plan.slots, threads=plan.threads, log=log))
            endpoint = server.endpoint
        setup = Setup(folder, plan.slots, plan.threads, endpoint)
        players = [stack.enter_context(Player(name, setup)) for name in names]
        for player in players:
            player.play(plan.traffic.poisson(WARM_UP, 1.0))
        for rate_per_s in plan.rates_per_s:
            schedule = plan.traffic.poisson(rate_per_s, plan.duration_s)
            for player in players:
                begin = time.monotonic()
                recording = player.play(schedule)
                summary = Summary.of(player.name, rate_per_s, recording)
                _say(
                    f"{player.name} at {rate_per_s:g} requests/s: {summary.requests} requests in "
                    f"{time.monotonic() - begin:.0f} s, {sum(summary.errors.values())} failed."
                )
                yield summary, recording


def write(plan: Plan, runs: list[tuple[Summary, Recording]], folder: Path) -> None:
    """Writes the plan, all measured times, and the charts into a folder."""
    # This import takes a second, which --help should not.
    from tests.benchmarks.charts import draw

    results = {
        "plan": asdict(plan),
        "runs": [asdict(summary) | {"recording": asdict(recording)} for summary, recording in runs],
    }
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    files = [folder / "results.json", *draw(runs, folder)]
    _say("Wrote " + ", ".join(map(str, files)))


def _say(sentence: str) -> None:
    print(("\r\x1b[K" if sys.stderr.isatty() else "") + sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(app)
