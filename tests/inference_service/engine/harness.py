"""An engine on a tiny real model, with its real thread, for tests."""

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from inference_service.engine.engine import Engine
from inference_service.engine.request import Delta, Draw, Event, Failed, Finished, GenerationRequest, Output
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.decoder import Decoder
from shared.decoding.sampling import Logits, SamplingParameters
from shared.decoding.spans import Span
from shared.gpt.model import GPT
from tests.decoders import cpu_decoder
from tests.fakes import byte_tokenizer, tiny_model
from tests.waiting import HANG_S

SLOTS = 4


@dataclass
class Result:
    events: list[Event]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def draws(self) -> list[Draw]:
        return [draw for event in self.events if isinstance(event, Delta) for draw in event.draws]

    @property
    def tokens(self) -> list[int]:
        return [draw.token for draw in self.draws]

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]


class Harness:
    """An engine whose events the test's thread reads. It decodes on the CPU, one token a step."""

    def __init__(self, slots: int = SLOTS, prefill_tokens: int = 64, prefix_bytes: int = 0) -> None:
        self.failures = 0
        self.slots = slots
        self._outbox: queue.Queue[list[Output]] = queue.Queue()
        self._results: dict[str, list[Result]] = {}
        # The outputs of each step.
        self.steps: list[list[Output]] = []
        self.engine = Engine(slots, prefill_tokens, prefix_bytes, self._outbox.put, self._fail)
        self.engine.start()

    def _fail(self) -> None:
        self.failures += 1

    @property
    def names(self) -> list[str]:
        """The requests that were submitted."""
        return list(self._results)

    def add(self, version: int, seed: int) -> None:
        self.add_model(version, tiny_model(seed))

    def add_model(self, version: int, model: GPT, decoder: Decoder | None = None) -> None:
        decoder = decoder or cpu_decoder(model, self.slots)
        self.engine.add_version(version, decoder, byte_tokenizer(), model.config.context_length).result(HANG_S)

    def submit(self, *requests: GenerationRequest) -> None:
        """Submits all requests before the engine's next step."""
        with self.engine._inbox._changed:
            for request in requests:
                self._results[request.id] = [Result([]) for _ in range(request.samples)]
                self.engine.submit(request)

    def wait(
        self, request_id: str, kind: type[Event] | tuple[type[Event], ...] = (Finished, Failed), index: int = 0
    ) -> Result:
        """Reads events until this sample has an event of a kind."""
        result = self._results[request_id][index]
        while not any(isinstance(event, kind) for event in result.events):
            self.read(HANG_S)
        return result

    def read(self, timeout_s: float) -> None:
        """Reads the outputs of one step."""
        self.steps.append(self._outbox.get(timeout=timeout_s))
        for output in self.steps[-1]:
            self._results[output.request_id][output.index].events.append(output.event)

    def generate(self, *requests: GenerationRequest) -> list[Result]:
        self.submit(*requests)
        return [self.wait(request.id) for request in requests]

    def samples(self, request: GenerationRequest) -> list[Result]:
        self.submit(request)
        return [self.wait(request.id, index=index) for index in range(request.samples)]


def request(name: str, prompt: str = "Once", **values: object) -> GenerationRequest:
    base = GenerationRequest(
        id=name,
        version=1,
        prompt=tuple(prompt.encode()),
        seed=1234,
        max_tokens=20,
        arrived=time.monotonic(),
        sampling=SamplingParameters(temperature=1.0),
        ignore_eos=True,
    )
    return replace(base, **values)  # type: ignore[arg-type]


def break_forward(monkeypatch: pytest.MonkeyPatch, when: Callable[[Sequence[Span]], bool]) -> None:
    """Makes the steps of a kind fail halfway."""
    forward = CpuDecoder.forward

    def failing(self: CpuDecoder, spans: Sequence[Span]) -> Sequence[Logits]:
        if when(spans):
            for keys, values in self._caches:
                keys[:], values[:] = np.nan, np.nan
            raise RuntimeError("the device is gone")
        return forward(self, spans)

    monkeypatch.setattr(CpuDecoder, "forward", failing)


def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes steps slow enough for a test to act while a stream runs."""

    def wait(spans: Sequence[Span]) -> bool:
        time.sleep(0.003)
        return False

    break_forward(monkeypatch, wait)
