"""An HTTP client of this project's inference server, as OpenAI's clients are. Loads no model."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.server import resident_bytes
from tests.benchmarks.setup import Setup


class Generation:
    """Generates for all rows at once, each as a stream of server-sent events on a connection of its own."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        endpoint = Setup.from_dict(setup).endpoint
        assert endpoint is not None
        self._endpoint, self._work = endpoint, ClosedLoop(**work)
        self._runner = asyncio.Runner()
        limits = httpx.Limits(max_connections=self._work.rows, max_keepalive_connections=self._work.rows)
        self._client = httpx.AsyncClient(base_url=endpoint.url, trust_env=False, limits=limits, timeout=None)
        self._prompts = self._work.prompts()

    def step(self) -> None:
        self._runner.run(self._generate(next(self._prompts)))

    async def _generate(self, prompts: Sequence[Sequence[int]]) -> None:
        self._work.check(await asyncio.gather(*map(self._tokens, prompts)))

    async def _tokens(self, prompt: Sequence[int]) -> int:
        body = {
            "prompt": list(prompt),
            "max_tokens": self._work.output_tokens,
            "temperature": 0.8,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        last = b""
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for part in response.aiter_raw():
                last = last[-1000:] + part
        # A client reads the text as it comes; the count stands at the end.
        return int(last.rpartition(b'"completion_tokens":')[2].partition(b",")[0])

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_bytes(self._endpoint.metrics_port)

    def end(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()
