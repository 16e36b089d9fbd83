"""Measures the cost of prompts, for the requests that wait for them and for others: python -m tests.benchmarks.latency

First, prompts of several lengths alone. Second, prompts that share their first half, with and without the prefix cache.
Third, streams that decode while long prompts are read, with several budgets of prompt tokens a step.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from shared.decoding.spans import SPAN_TOKENS
from shared.device import accelerator
from shared.gpt.config import GPTConfig
from shared.service import cli
from tests.benchmarks.checkpoint import tokenizer_for
from tests.benchmarks.side_by_side import ROOT, print_table
from trainer_service.presets import find_preset

if TYPE_CHECKING:
    from inference_service.engine.engine import Engine
    from inference_service.engine.request import Output

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")

Tokens = tuple[int, ...]

_CACHE = ROOT / ".pytest_cache" / "benchmarks"


class Client:
    """Sends requests to an engine and records the times of their tokens."""

    def __init__(self, engine: "Engine", outputs: "SimpleQueue[list[Output]]") -> None:
        self._engine = engine
        self._outputs = outputs
        self.times: dict[str, list[float]] = {}

    def submit(self, prompt: Tokens, max_tokens: int) -> str:
        """Submits a prompt and returns the id of the request."""
        from inference_service.engine.request import GenerationRequest

        name = str(len(self.times))
        self.times[name] = []
        request = GenerationRequest(
            id=name,
            version=1,
            prompt=prompt,
            seed=0,
            max_tokens=max_tokens,
            arrived=time.monotonic(),
            ignore_eos=True,
        )
        self._engine.submit(request)
        return name

    def wait(self, until: Callable[[], bool]) -> None:
        """Reads events until a condition holds."""
        from inference_service.engine.request import Delta

        while not until():
            for output in self._outputs.get():
                if isinstance(output.event, Delta):
                    self.times[output.request_id] += output.event.times

    def first_token_s(self, prompt: Tokens) -> float:
        """Returns the time to the first token of a prompt."""
        begin = time.monotonic()
        name = self.submit(prompt, 1)
        self.wait(lambda: len(self.times[name]) == 1)
        return self.times[name][0] - begin

    def gaps_s(self, names: list[str], begin: float, end: float) -> list[float]:
        """Returns the times between two tokens of a stream that both arrived between `begin` and `end`."""
        within = [[at for at in self.times[name] if begin <= at <= end] for name in names]
        return [later - earlier for times in within for earlier, later in pairwise(times)]


@app.command()
def main(
    preset: Annotated[str, typer.Option()] = "tinystories-53m",
    rounds: Annotated[int, typer.Option(help="Prompts of each kind.")] = 7,
    budget: Annotated[list[int], typer.Option(help="Prompt tokens a step; repeatable.")] = [64, 128, 256],  # noqa: B006
) -> None:
    """Print the time to the first token of prompts of several lengths, and of prompts that share their first half, and
    the gaps between tokens of streams that decode beside prompts."""
    config = find_preset(preset).gpt
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = accelerator.prepare(_CACHE)
    print(f"{preset}, one prompt at a time, as many of its tokens a step as the server takes, {rounds} of each in turn")
    print_lengths(config, device.backend, rounds)
    half = config.context_length * 3 // 8
    print(f"\n{preset}, prompts of {2 * half} tokens that share their first {half}, one core, {rounds} of each in turn")
    print_shared(config, half, rounds)
    print(f"\n{preset}, seven streams that decode while prompts of {2 * half} tokens are read in the eighth slot")
    print_gaps(config, 2 * half, rounds, budget)


def print_lengths(config: GPTConfig, backend: str, rounds: int) -> None:
    """Prints the time to the first token of prompts of several lengths, the longest as long as the context allows."""
    from inference_service.settings import prefill_tokens_on

    text = texts(config)
    times: dict[int, list[float]] = {length: [] for length in (32, 128, config.context_length - 1)}
    with engine(config, prefill_tokens_on(backend), 0) as client:
        for _ in range(rounds):
            for length, firsts_s in times.items():
                firsts_s.append(client.first_token_s(text(length)))
    rows = [[str(length), f"{statistics.median(firsts_s) * 1e3:.1f} ms"] for length, firsts_s in times.items()]
    print_table(["prompt tokens", "time to first token"], rows)


def print_shared(config: GPTConfig, half: int, rounds: int) -> None:
    """Prints the time to the first token of prompts whose first half is cached, and without a cache."""
    text = texts(config)
    with engine(config, SPAN_TOKENS, 0) as uncached, engine(config, SPAN_TOKENS, 128 << 20) as cached:
        times: dict[str, list[float]] = {"off": [], "on": []}
        prefix = text(half)
        cached.first_token_s(prefix + text(half))
        for _ in range(rounds):
            prompt = prefix + text(half)
            times["off"].append(uncached.first_token_s(prompt))
            times["on"].append(cached.first_token_s(prompt))
    medians_s = {name: statistics.median(values) for name, values in times.items()}
    rows = [[name, f"{value * 1e3:.1f} ms", f"{value / medians_s['off']:.2f}"] for name, value in medians_s.items()]
    print_table(["prefix cache", "time to first token", "ratio"], rows)


def print_gaps(config: GPTConfig, length: int, rounds: int, budgets: list[int]) -> None:
    """Prints the gaps between the tokens of running streams, and the time to the first token of prompts beside them."""
    text = texts(config)
    rows = []
    for budget in budgets:
        with engine(config, budget, 0) as client:
            names = [client.submit(text(16), config.context_length - 16) for _ in range(7)]

            def decoded(count: int, client: Client = client, names: list[str] = names) -> Callable[[], bool]:
                return lambda: all(len(client.times[name]) >= count for name in names)

            client.wait(decoded(5))
            quiet = time.monotonic()
            client.wait(decoded(25))
            busy = time.monotonic()
            firsts_s = [client.first_token_s(text(length)) for _ in range(rounds)]
            quiet_s, busy_s = client.gaps_s(names, quiet, busy), client.gaps_s(names, busy, time.monotonic())
        figures = [statistics.median(quiet_s), statistics.median(busy_s), max(busy_s), statistics.median(firsts_s)]
        steps = math.ceil(math.ceil(length / SPAN_TOKENS) / (budget // SPAN_TOKENS))
        rows.append([str(budget), *(f"{figure * 1e3:.1f} ms" for figure in figures), str(steps)])
    columns = ["prompt tokens a step", "gap without prompts", "gap", "longest gap", "time to first token", "steps"]
    print_table(columns, rows)


def texts(config: GPTConfig) -> Callable[[int], Tokens]:
    """Returns a function that draws random tokens."""
    generator = np.random.default_rng(1)
    return lambda length: tuple(generator.integers(config.vocabulary_size, size=length).tolist())


@contextmanager
def engine(config: GPTConfig, prefill_tokens: int, prefix_bytes: int) -> Iterator[Client]:
    """Runs a warmed-up engine of eight slots on random weights."""
    import mlx.core as mx

    from inference_service.engine.engine import Engine
    from shared.decoding.decoder import DecoderFactory
    from shared.decoding.weight_format import DEFAULT_WEIGHTS
    from shared.gpt.model import GPT

    mx.random.seed(1)
    model = GPT(config)
    model.eval()
    mx.eval(model.parameters())
    outputs: SimpleQueue[list[Output]] = SimpleQueue()
    running = Engine(8, prefill_tokens, prefix_bytes, outputs.put, lambda: None)
    running.start()
    try:
        decoder = DecoderFactory(8, 1, _CACHE, DEFAULT_WEIGHTS).make(model)
        running.add_version(1, decoder, tokenizer_for(config.vocabulary_size), config.context_length).result()
        client = Client(running, outputs)
        client.first_token_s(texts(config)(config.context_length // 2))
        yield client
    finally:
        running.stop()


if __name__ == "__main__":
    cli.run(app)
