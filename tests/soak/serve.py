"""Sends a server clients of all kinds, at times more than it can serve, while some of its steps fail or take long.

`python -m tests.soak.serve --minutes 10`
"""

import asyncio
import random
import re
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterable, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import grpc
import grpc.aio
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from inference_service.client import AsyncInferenceClient
from inference_service.client.client import Parameters
from shared.errors import DeadlineExceeded, GptloopError, InvalidArgument, ResourceExhausted
from shared.gpt.config import GPTConfig
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service import cli
from shared.service.grpc_status import error_of
from shared.service.lists import print_rows
from shared.text import format_duration
from tests.fakes import publish_tiny_version
from tests.inference_service.process import BREAKABLE, SMALL_WINDOW, Server
from tests.waiting import wait_until

MODEL = GPTConfig(6, 256, 4, 1024, 512, vocabulary_size=257, tied_head=False)
SLOTS = 8
# At the end of each minute, for this long, clients arrive this many times as often.
BURST_S, BURST = 5.0, 10
# A soak of at least this many minutes, at this rate of clients a second, must produce every outcome.
FULL_MINUTES, RATE = 5.0, 40.0
# The most that health may lag behind the state of the server.
LAG_S = 1.0
STORY = "Once upon a time there was a little dog who lived in a small house near the forest. "


@dataclass(frozen=True)
class _Kind:
    """A kind of client: its share of all clients, its call, and the outcome that it must produce at least once."""

    share: float
    name: str
    call: Callable[[], Awaitable[str]]
    must_see: str


@dataclass(frozen=True)
class _Sample:
    """Metrics of the server at one moment."""

    resident_bytes: float
    active_streams: float


class Soak:
    """Clients of all kinds, and their outcomes."""

    def __init__(self, server: Server, client: AsyncInferenceClient, seed: int) -> None:
        self._server = server
        self._client = client
        self._random = random.Random(seed)
        self._expected: dict[tuple[str, int], str] = {}
        self.outcomes: dict[str, Counter[str]] = {}
        self.violations: list[str] = []
        self.samples: list[_Sample] = []
        # The times at which this soak paused the engine, and at which health changed.
        self._pauses: list[float] = []
        self._health: list[tuple[float, bool]] = []
        # The times at which the machine itself stalled: a thread that only sleeps woke up late.
        self._stalls: list[float] = []
        self._ended = threading.Event()
        self._kinds = [
            _Kind(0.60, "reads all", self._read_all, must_see="complete"),
            _Kind(0.13, "cancels", self._cancel, must_see="cancelled"),
            _Kind(0.10, "has a deadline", self._deadline, must_see="deadline"),
            _Kind(0.08, "shares a prefix", self._share, must_see="complete, cached prefix"),
            _Kind(0.05, "wants samples", self._samples, must_see="complete"),
            _Kind(0.03, "sends invalid requests", self._send_invalid, must_see="invalid"),
            _Kind(0.01, "reads slowly", self._read_slowly, must_see="too slow"),
        ]

    async def run(self, minutes: float, rate: float) -> None:
        """Starts clients for this time, `rate` a second on average, and waits for the last of them."""
        for prompt in (STORY[:40], STORY * 3):
            for seed in range(4):
                completion = await self._client.complete(prompt, seed=seed, max_tokens=60, ignore_eos=True)
                self._expected[prompt, seed] = completion.text
        threading.Thread(target=self._watch_machine).start()
        watching = asyncio.create_task(self._watch_health())
        sampling = asyncio.create_task(self._sample())
        begin, end_s = time.monotonic(), minutes * 60
        clients: set[asyncio.Task[None]] = set()
        ordered = 0
        while (elapsed_s := time.monotonic() - begin) < end_s:
            burst = elapsed_s % 60 > 60 - BURST_S
            await asyncio.sleep(self._random.expovariate(rate * (BURST if burst else 1)))
            task = asyncio.create_task(self._one())
            clients.add(task)
            task.add_done_callback(clients.discard)
            if elapsed_s > 20 * (ordered + 1):
                # A step that fails and a step that takes three seconds, in turn.
                ordered += 1
                at = self._server.order("fail once" if ordered % 2 else "pause")
                if ordered % 2 == 0:
                    self._pauses.append(at)
                print(f"{format_duration(elapsed_s)} of {format_duration(end_s)}: {self._line()}", flush=True)
        await asyncio.gather(*clients)
        await asyncio.sleep(2 * LAG_S)
        sampling.cancel()
        watching.cancel()
        await asyncio.gather(sampling, watching, return_exceptions=True)
        self._ended.set()
        self._check_health()
        await self._check_rest()
        if minutes >= FULL_MINUTES and rate >= RATE:
            self._check_outcomes()

    async def _one(self) -> None:
        (kind,) = self._random.choices(self._kinds, [kind.share for kind in self._kinds])
        try:
            outcome = await kind.call()
        except ResourceExhausted as error:
            outcome = "overloaded" if error.retry_after_s is not None else "too slow"
        except DeadlineExceeded:
            outcome = "deadline"
        except GptloopError as error:
            if "A step of this stream failed" not in str(error):
                self.violations.append(f"{kind.name}: {error}")
            outcome = "step failed"
        except Exception as error:
            self.violations.append(f"{kind.name}: {error!r}")
            outcome = "unexpected"
        self.outcomes.setdefault(kind.name, Counter())[outcome] += 1

    async def _read_all(self) -> str:
        (prompt, seed), expected = self._random.choice(list(self._expected.items()))
        completion = await self._client.complete(prompt, seed=seed, max_tokens=60, ignore_eos=True)
        if completion.text != expected:
            self.violations.append(f"The text of seed {seed} changed.")
        return "complete"

    async def _share(self) -> str:
        prompt = STORY * 3 + str(self._random.random())
        completion = await self._client.complete(prompt, max_tokens=20, ignore_eos=True)
        return "complete, cached prefix" if completion.samples[0].cached_prompt_tokens else "complete"

    async def _samples(self) -> str:
        seed = self._random.randrange(2)
        samples = (await self._client.complete(STORY[:40], seed=seed, n=3, max_tokens=60, ignore_eos=True)).samples
        if [sample.text for sample in samples[:2]] != [self._expected[STORY[:40], seed + i] for i in range(2)]:
            self.violations.append("A sample differed from the same request alone.")
        return "complete"

    async def _cancel(self) -> str:
        patience_s = self._random.uniform(0.0, 0.4)
        begin = time.monotonic()
        async with self._client.generate(STORY * 3, max_tokens=200, ignore_eos=True) as stream:
            task = asyncio.ensure_future(_drain(stream))
            await asyncio.wait((task,), timeout=patience_s)
            if task.done():
                task.result()
                return "complete"
            task.cancel()
            await asyncio.wait((task,))
        if time.monotonic() - begin > patience_s + 5:
            self.violations.append("A cancellation took more than 5 s.")
        return "cancelled"

    async def _deadline(self) -> str:
        timeout_s = self._random.uniform(0.002, 0.4)
        await self._client.complete(STORY * 2, max_tokens=250, ignore_eos=True, timeout_s=timeout_s)
        return "complete"

    async def _send_invalid(self) -> str:
        choices: list[Parameters] = [{"top_p": 7.0}, {"n": 99}, {"logit_bias": {9999: 1.0}}]
        invalid = self._random.choice(choices)
        try:
            await self._client.complete("x", **invalid)
        except InvalidArgument:
            return "invalid"
        self.violations.append(f"The server accepted {invalid}.")
        return "accepted"

    async def _read_slowly(self) -> str:
        async with grpc.aio.insecure_channel(self._server.address, options=SMALL_WINDOW) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call: Any = stub.Generate(pb.GenerateRequest(prompt="x", max_tokens=500, ignore_eos=True, logprobs=20))
            try:
                await call.read()
                await asyncio.sleep(4)
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                raise error_of(error, self._server.address) from None
        return "complete"

    async def _watch_health(self) -> None:
        async with grpc.aio.insecure_channel(self._server.address, options=SMALL_WINDOW[:1]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            async for answer in stub.Watch(health_pb2.HealthCheckRequest()):
                self._health.append((time.monotonic(), answer.status == health_pb2.HealthCheckResponse.SERVING))

    def _watch_machine(self) -> None:
        while not self._ended.is_set():
            begin = time.monotonic()
            time.sleep(0.05)
            if time.monotonic() - begin > 0.3:
                self._stalls.append(time.monotonic())

    async def _sample(self) -> None:
        while True:
            values = await asyncio.to_thread(self._server.metrics)
            resident_bytes = values["gptloop_inference_memory_bytes", "resident"]
            active_streams = values["gptloop_inference_active_streams",]
            self.samples.append(_Sample(resident_bytes, active_streams))
            if active_streams > SLOTS:
                self.violations.append(f"{active_streams:.0f} streams are active in {SLOTS} slots.")
            await asyncio.sleep(1)

    def _check_health(self) -> None:
        """Checks that health is SERVING except in the pauses, in which it must change within `LAG_S`."""
        for at in self._pauses:
            changes = [(moment - at, serving) for moment, serving in self._health if 0 <= moment - at < 3 + 2 * LAG_S]
            # The pause starts with the next step, shortly after the order.
            if [serving for _, serving in changes] != [False, True]:
                self.violations.append(f"Health changed in a wrong way in a pause of 3 s: {changes}.")
            elif changes[0][0] > LAG_S or changes[1][0] > 3 + LAG_S:
                self.violations.append(f"Health changed too late in a pause: {changes}.")
        for moment, serving in self._health[1:]:
            explained = [*(at + 1.5 for at in self._pauses), *self._stalls]
            if not any(abs(moment - at) < 1.5 + LAG_S for at in explained):
                self.violations.append(f"Health became {'' if serving else 'NOT_'}SERVING without a reason.")

    async def _check_rest(self) -> None:
        """Checks that nothing runs or waits, that all slots are free, and that memory has not grown."""
        values = await asyncio.to_thread(self._server.metrics)
        for name in ("active_streams", "waiting_requests"):
            if values[f"gptloop_inference_{name}",]:
                self.violations.append(f"{name} is {values[f'gptloop_inference_{name}',]:.0f} after the last client.")
        completions = await asyncio.gather(
            *(self._client.complete(STORY[:40], seed=0, max_tokens=60, ignore_eos=True) for _ in range(SLOTS))
        )
        if {completion.text for completion in completions} != {self._expected[STORY[:40], 0]}:
            self.violations.append("A text at the end differs from the same text at the beginning.")
        early, late = self.memory_mib()
        if late > early + 8:
            self.violations.append(f"Memory grew from {early:.0f} to {late:.0f} MiB.")

    def _check_outcomes(self) -> None:
        """Checks that each kind of client saw its outcome, and that overload and failed steps occurred."""
        for kind in self._kinds:
            if not self.outcomes.get(kind.name, Counter())[kind.must_see]:
                self.violations.append(f"No client that {kind.name} saw the outcome {kind.must_see!r}.")
        for outcome in ("overloaded", "step failed"):
            if not any(counts[outcome] for counts in self.outcomes.values()):
                self.violations.append(f"No client saw the outcome {outcome!r}.")

    def memory_mib(self) -> tuple[float, float]:
        """Returns the median of the resident memory in the second and in the last fifth of the time."""
        fifth = max(1, len(self.samples) // 5)
        second, last = self.samples[fifth : 2 * fifth], self.samples[-fifth:]
        return tuple(median(sample.resident_bytes for sample in part) / 2**20 for part in (second or last, last))  # type: ignore[return-value]

    def _line(self) -> str:
        clients = sum(outcome.total() for outcome in self.outcomes.values())
        memory = self.samples[-1].resident_bytes / 2**20 if self.samples else 0
        return f"{clients} clients, {memory:.0f} MiB, {len(self.violations)} violations"

    def print_summary(self) -> None:
        """Prints the outcomes of each kind of client, and the figures."""
        outcomes = sorted({outcome for counts in self.outcomes.values() for outcome in counts})
        rows = [
            (kind, *(str(counts[outcome] or "") for outcome in outcomes))
            for kind, counts in sorted(self.outcomes.items(), key=lambda pair: -pair[1].total())
        ]
        print_rows(("client", *outcomes), rows)
        early, late = self.memory_mib()
        active = [sample.active_streams for sample in self.samples]
        print(f"resident memory {early:.0f} MiB in the second fifth of the time, {late:.0f} MiB in the last")
        print(f"active streams {median(active):.0f} in the median, {max(active):.0f} at most, of {SLOTS} slots")
        late_s = [
            min((moment - at for moment, serving in self._health if moment > at and not serving), default=99.0)
            for at in self._pauses
        ]
        print(f"health reported {len(late_s)} pauses after at most {max(late_s, default=0):.2f} s", end="; ")
        print(f"the machine itself stalled {len(self._stalls)} times")


async def _drain(stream: AsyncIterable[object]) -> None:
    async for _ in stream:
        pass


async def soak(server: Server, minutes: float, rate: float, seed: int) -> Soak:
    """Runs the soak on one event loop."""
    async with AsyncInferenceClient(server.address, retries=0) as client:
        soak = Soak(server, client, seed)
        await soak.run(minutes, rate)
        return soak


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    minutes: Annotated[float, typer.Option(min=0.5, help="Minutes in which clients arrive.")] = 10.0,
    rate: Annotated[float, typer.Option(min=0.1, help="Clients that arrive a second, outside bursts.")] = RATE,
    seed: Annotated[int | None, typer.Option(help="Seed of the clients and their times; random by default.")] = None,
) -> None:
    seed = random.SystemRandom().randrange(1000) if seed is None else seed
    folder = Path(tempfile.mkdtemp(prefix="gptloop-soak-"))
    print(f"seed {seed}, files in {folder}", flush=True)
    settings = {"SLOTS": SLOTS, "MAX_WAITING_REQUESTS": 32, "SLOW_READER_S": 2, "PREFIX_CACHE_MIB": 32}
    server = Server(
        folder / "var", BREAKABLE, **{f"GPTLOOP_INFERENCE_{name}": str(value) for name, value in settings.items()}
    )
    try:
        publish_tiny_version(server.registry, 1.0, config=MODEL)
        wait_until(server.serves)
        result = asyncio.run(soak(server, minutes, rate, seed))
    finally:
        code = server.end()
    result.print_summary()
    log = "".join(server.lines)
    if code != 0:
        result.violations.append(f"The server ended with {code}.")
    traces = len(re.findall("Traceback", log)) - len(re.findall("a step of .* streams failed", log))
    if traces:
        result.violations.append(f"The server's log has {traces} unexpected stack traces.")
    for text in result.violations[:20]:
        print(f"violation: {text}")
    if result.violations:
        print(f"{len(result.violations)} violations; the server's log is {folder / 'log'}")
        (folder / "log").write_text(log)
        raise typer.Exit(1)
    print("No leak, no stuck slot, and health was always correct.")
    shutil.rmtree(folder)


if __name__ == "__main__":
    cli.run(app)
