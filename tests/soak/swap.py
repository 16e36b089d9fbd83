"""Swaps versions a hundred times while clients stream all the time, half of them over gRPC and half over HTTP.

`python -m tests.soak.swap --streams 64 --swaps 100`
"""

import asyncio
import json
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import httpx
import numpy as np
import typer

from inference_service.client import AsyncInferenceClient
from shared.errors import Unavailable
from shared.gpt.config import GPTConfig
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service import cli
from shared.service.lists import print_rows
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server

# As deep and as wide as tinystories-53m; its tokens are bytes.
MODEL = GPTConfig(8, 384, 8, 1536, 512, vocabulary_size=257, tied_head=False)
# Versions use the weights of these two seeds in turn.
WEIGHTS = (0, 1)
PROMPT = "Once upon a time there was a little dog"
SEEDS = 4
# The time without swaps, before and after the swaps.
STEADY_S = 20.0
# The largest 99th percentile of gaps while swapping, relative to the steady one.
MOST_P99_RATIO = 1.5

# Tokens and their log-probabilities.
Answer = tuple[tuple[int, ...], tuple[float, ...]]


@dataclass
class Phase:
    """Measurements of the streams in one phase."""

    name: str
    # Seconds between two messages of a stream.
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    memory: dict[str, float] = field(default_factory=dict)


def _byte_of(name: str) -> int:
    """Returns the token with this name: tokens are bytes."""
    return int(name.removeprefix("bytes:\\x"), 16) if name.startswith("bytes:") else ord(name)


class Swaps:
    """Streams on a server, and the versions that are published for it."""

    def __init__(
        self,
        server: Server,
        client: AsyncInferenceClient,
        http: httpx.AsyncClient,
        model: GPTConfig,
        streams: int,
        tokens: int,
    ) -> None:
        self._server = server
        self._client = client
        self._http = http
        self._model = model
        self._streams = streams
        self._tokens = tokens
        self._published = 0
        # The newest version that has started a stream.
        self._seen = 0
        self._expected: dict[tuple[int, int], Answer] = {}
        self._stopping = False
        self._phase = Phase("")
        self.answers: Counter[int] = Counter()
        self.violations: list[str] = []
        self.swap_seconds: list[float] = []
        self.phases: list[Phase] = []

    async def run(self, swaps: int, steady_s: float) -> None:
        """Streams before, during and after the swaps. A tenth as many swaps come first, until memory stops growing."""
        await self._prepare()
        readers = [asyncio.create_task(self._read(number)) for number in range(self._streams)]
        for _ in range(max(1, swaps // 10)):
            await self._swap()
        await self._pass("steady", steady_s)
        begin, self._phase = time.monotonic(), Phase("swapping")
        for number in range(swaps):
            await self._swap()
            if number % 10 == 9:
                counts = f"{self.answers.total()} streams, {len(self.violations)} violations"
                print(f"{number + 1} of {swaps} swaps, {counts}", flush=True)
        await self._close(begin)
        await self._pass("steady again", steady_s)
        self._stopping = True
        await asyncio.gather(*readers)
        if len(self.answers) < swaps / 2:
            self.violations.append(f"Only {len(self.answers)} versions had streams.")

    async def _prepare(self) -> None:
        """Records the expected stream of each seed and weights, without swaps."""
        for weights in WEIGHTS:
            await self._publish()
            async with asyncio.timeout(120):
                while self._seen != self._published:
                    with suppress(Unavailable):  # the first version does not serve yet
                        await self._answer_grpc(0)
            for seed in range(SEEDS):
                _, self._expected[weights, seed] = await self._answer_grpc(seed)

    async def _swap(self) -> None:
        """Publishes a better version and waits until a stream has started on it."""
        await self._publish()
        committed = time.monotonic()
        async with asyncio.timeout(120):
            while self._seen != self._published:
                await asyncio.sleep(0.02)
        self.swap_seconds.append(time.monotonic() - committed)

    async def _publish(self, better: bool = True) -> None:
        self._published += 1
        await asyncio.to_thread(
            publish_tiny_version,
            self._server.registry,
            1.0 / self._published if better else 2.0,
            seed=WEIGHTS[(self._published - 1) % 2],
            config=self._model,
            windows=(8, 128),
        )

    async def _read(self, number: int) -> None:
        seed = number // 2 % SEEDS
        ask = self._answer_http if number % 2 else self._answer_grpc
        while not self._stopping:
            try:
                version, answer = await ask(seed)
            except Exception as error:
                self.violations.append(f"A call failed: {error!r}")
                return
            self.answers[version] += 1
            if answer != self._expected[WEIGHTS[(version - 1) % 2], seed]:
                self.violations.append(f"A stream of version {version} differed from the same stream without swaps.")

    async def _answer_grpc(self, seed: int) -> tuple[int, Answer]:
        version, last = 0, None
        tokens: list[int] = []
        logprobs: list[float] = []
        async with self._client.generate(
            PROMPT, seed=seed, max_tokens=self._tokens, ignore_eos=True, logprobs=0
        ) as stream:
            async for event in stream:
                match event:
                    case pb.Started():
                        version = event.model_version
                        self._seen = max(self._seen, version)
                    case pb.Delta():
                        last = self._measure(last, len(event.token_ids))
                        tokens += event.token_ids
                        logprobs += [each.logprob for each in event.logprobs]
        return version, (tuple(tokens), tuple(logprobs))

    async def _answer_http(self, seed: int) -> tuple[int, Answer]:
        version, last = 0, None
        tokens: list[int] = []
        logprobs: list[float] = []
        body = {
            "prompt": PROMPT,
            "seed": seed,
            "max_tokens": self._tokens,
            "temperature": 0.8,
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
        }
        async with self._http.stream("POST", "v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                content = line.removeprefix("data: ")
                if not content or content == "[DONE]":
                    continue
                event = json.loads(content)
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                version = int(event["model"])
                self._seen = max(self._seen, version)
                columns = event["choices"][0]["logprobs"]
                if columns["tokens"]:
                    last = self._measure(last, len(columns["tokens"]))
                tokens += map(_byte_of, columns["tokens"])
                # gRPC carries them in fp32.
                logprobs += [float(np.float32(logprob)) for logprob in columns["token_logprobs"]]
        return version, (tuple(tokens), tuple(logprobs))

    def _measure(self, last: float | None, tokens: int) -> float:
        """Counts the tokens of a message; returns its time, `last` being that of the message before it."""
        now = time.monotonic()
        if last is not None:
            self._phase.gaps.append(now - last)
        self._phase.tokens += tokens
        return now

    async def _pass(self, name: str, seconds: float) -> None:
        """Runs a phase without swaps. Versions are published at the same rate, but they are not better."""
        begin, self._phase = time.monotonic(), Phase(name)
        while time.monotonic() - begin < seconds:
            await self._publish(better=False)
            await asyncio.sleep(self.swap_seconds[-1])
        await self._close(begin)

    async def _close(self, begin: float) -> None:
        phase = self._phase
        phase.seconds = time.monotonic() - begin
        values = await asyncio.to_thread(self._server.metrics)
        phase.memory = {kind: values["gptloop_inference_memory_bytes", kind] for kind in ("active", "resident")}
        self.phases.append(phase)

    def check_gaps(self) -> None:
        """Checks that swaps hardly lengthen the gaps between messages."""
        if (ratio := self.p99("swapping") / self.p99("steady")) > MOST_P99_RATIO:
            self.violations.append(f"p99 while swapping is {ratio:.2f} times the steady one.")

    def check_memory(self) -> None:
        """Checks that versions that are gone leave no memory behind."""
        first, *_, last = self.phases
        for kind, slack_mib in (("active", 1), ("resident", 24)):
            grown = (last.memory[kind] - first.memory[kind]) / 2**20
            if grown > slack_mib:
                self.violations.append(f"The {kind} memory grew by {grown:.0f} MiB.")

    def p99(self, name: str) -> float:
        """Returns the 99th percentile of the gaps in the phases whose name starts with `name`, in seconds."""
        gaps = [gap for phase in self.phases if phase.name.startswith(name) for gap in phase.gaps]
        return float(np.percentile(gaps, 99))

    def print_summary(self) -> None:
        """Prints the figures of each phase."""
        columns = ("phase", "seconds", "tokens/s", "gap p50", "gap p99", "gap max", "MLX active", "resident")
        rows = [
            (
                phase.name,
                f"{phase.seconds:.0f}",
                f"{phase.tokens / phase.seconds:.0f}",
                *(f"{np.percentile(phase.gaps, q) * 1000:.1f} ms" for q in (50, 99, 100)),
                *(f"{phase.memory[kind] / 2**20:.0f} MiB" for kind in ("active", "resident")),
            )
            for phase in self.phases
        ]
        print_rows(columns, rows)
        print(f"{self.answers.total()} streams on {len(self.answers)} versions")
        print(
            f"a version serves {np.median(self.swap_seconds):.1f} s after its commit in the median, "
            f"{max(self.swap_seconds):.1f} s at most"
        )
        print(f"p99 while swapping is {self.p99('swapping') / self.p99('steady'):.2f} times the steady one")


async def swap(
    server: Server, model: GPTConfig, streams: int, swaps: int, tokens: int = 64, steady_s: float = STEADY_S
) -> Swaps:
    """Runs the soak on one event loop."""
    limits = httpx.Limits(max_connections=streams)
    async with (
        AsyncInferenceClient(server.address, retries=0) as client,
        httpx.AsyncClient(base_url=server.page_url, trust_env=False, limits=limits, timeout=None) as http,
    ):
        run = Swaps(server, client, http, model, streams, tokens)
        await run.run(swaps, steady_s)
        return run


def start(var: Path, slots: int) -> Server:
    """Starts a server for this many streams. Its gate accepts any loss, because all random weights are equally good."""
    settings = {"SLOTS": slots, "GATE_MARGIN": 100, "MAX_WAITING_REQUESTS": 1000}
    return Server(var, **{f"GPTLOOP_INFERENCE_{name}": str(value) for name, value in settings.items()})


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    streams: Annotated[int, typer.Option(min=1, help="Streams at any time.")] = 64,
    swaps: Annotated[int, typer.Option(min=1, help="Number of swaps.")] = 100,
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="gptloop-soak-"))
    print(f"files in {folder}", flush=True)
    server = start(folder / "var", streams)
    try:
        result = asyncio.run(swap(server, MODEL, streams, swaps))
    finally:
        code = server.end()
    result.check_memory()
    result.check_gaps()
    result.print_summary()
    log = "".join(server.lines)
    if code != 0 or "Traceback" in log:
        result.violations.append(f"The server ended with {code}; its log is {folder / 'log'}.")
        (folder / "log").write_text(log)
    for text in result.violations[:20]:
        print(f"violation: {text}")
    if result.violations:
        raise typer.Exit(1)
    print("No call failed, and every stream equals the same stream without swaps, bit for bit.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(app)
