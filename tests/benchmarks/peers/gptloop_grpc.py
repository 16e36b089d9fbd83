"""A gRPC client of this project's inference server. Loads no model."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio

from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.player import Progress
from tests.benchmarks.recording import OK, Recording, Stream
from tests.benchmarks.schedule import Arrival, Schedule
from tests.benchmarks.server import resident_bytes
from tests.benchmarks.setup import Setup

OPTIONS = [("grpc.enable_http_proxy", 0)]


def request(prompt: Sequence[int], output_tokens: int) -> pb.GenerateRequest:
    """Returns a request for exactly this many tokens, with the server's default sampling."""
    return pb.GenerateRequest(
        prompt_tokens=pb.TokenIds(ids=prompt),
        max_tokens=output_tokens,
        ignore_eos=True,
    )


class Serving:
    """Generates load: each request is a separate call, sent when it is due."""

    def __init__(self, setup: Setup) -> None:
        assert setup.endpoint is not None
        self._endpoint = setup.endpoint

    def play(self, schedule: Schedule, progress: Progress) -> Recording:
        return asyncio.run(self._play(schedule, progress))

    async def _play(self, schedule: Schedule, progress: Progress) -> Recording:
        async with grpc.aio.insecure_channel(self._endpoint.address, options=OPTIONS) as channel:
            await channel.channel_ready()
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            memory = [await self._resident_bytes()]
            sampling = asyncio.create_task(self._sample(memory))
            begin = time.monotonic()
            calls = (self._call(stub, arrival, begin, schedule.limit_s, progress) for arrival in schedule.arrivals)
            streams = await asyncio.gather(*calls)
            sampling.cancel()
            await asyncio.wait([sampling])
            memory.append(await self._resident_bytes())
        return Recording(streams, memory)

    async def _call(self, stub: Any, arrival: Arrival, begin: float, limit_s: float, progress: Progress) -> Stream:
        message = request(arrival.prompt, arrival.output_tokens)
        await asyncio.sleep(begin + arrival.at_s - time.monotonic())
        stream = Stream(arrival.at_s, time.monotonic() - begin)
        try:
            async for response in stub.Generate(message, timeout=limit_s):
                if response.HasField("delta"):
                    stream.token_s += [time.monotonic() - begin] * len(response.delta.token_ids)
                elif response.HasField("finished") and response.finished.reason != pb.FINISH_REASON_LENGTH:
                    stream.status = pb.FinishReason.Name(response.finished.reason)
        except grpc.aio.AioRpcError as error:
            stream.status = error.code().name
        stream.end_s = time.monotonic() - begin
        assert stream.status != OK or len(stream.token_s) == arrival.output_tokens
        progress.ended()
        return stream

    async def _sample(self, memory: list[int]) -> None:
        while True:
            await asyncio.sleep(1.0)
            memory.append(await self._resident_bytes())

    async def _resident_bytes(self) -> int:
        return await asyncio.to_thread(resident_bytes, self._endpoint.metrics_port)


class Generation:
    """Generates for all rows at once, as calls on one connection."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        endpoint = Setup.from_dict(setup).endpoint
        assert endpoint is not None
        self._endpoint, self._work = endpoint, ClosedLoop(**work)
        self._runner = asyncio.Runner()
        self._channel = self._runner.run(self._connect())
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._prompts = self._work.prompts()

    async def _connect(self) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(self._endpoint.address, options=OPTIONS)
        await channel.channel_ready()
        return channel

    def step(self) -> None:
        self._runner.run(self._generate(next(self._prompts)))

    async def _generate(self, prompts: Sequence[Sequence[int]]) -> None:
        self._work.check(await asyncio.gather(*map(self._tokens, prompts)))

    async def _tokens(self, prompt: Sequence[int]) -> int:
        tokens = 0
        async for response in self._stub.Generate(request(prompt, self._work.output_tokens)):
            tokens += len(response.delta.token_ids)
        return tokens

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_bytes(self._endpoint.metrics_port)

    def end(self) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()
