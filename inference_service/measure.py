"""Measures how fast this machine serves a version, and the memory that it takes.

The requests go through the engine, as the server builds it, but not through gRPC.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import numpy as np
from mlx.utils import tree_flatten

from inference_service.engine.engine import Engine
from inference_service.engine.request import Delta, Failed, Finished, GenerationRequest, Output
from inference_service.settings import Settings, prefill_tokens_on, weights_on
from shared.decoding.decoder import DecoderFactory
from shared.decoding.weight_format import WeightFormat
from shared.device import accelerator
from shared.device.accelerator import Accelerator
from shared.errors import FailedPrecondition
from shared.gpt.config import GPTConfig
from shared.registry.manifest import VersionManifest
from shared.version_format import read_model, read_tokenizer

# The tokens that each request brings and gets; fewer if the context is shorter.
_PROMPT_TOKENS, _OUTPUT_TOKENS = 16, 64
# The longest prompt whose reading is measured.
_LONG_PROMPT_TOKENS = 512
# Before each measurement, a round of so short answers does not count.
_WARM_TOKENS = 8
# Rounds follow one another for this time.
_LEAST_S = 3.0
# With a shorter context, no time passes between two tokens of a stream.
_LEAST_CONTEXT = 3


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of a time, in milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, times_s: Sequence[float]) -> Self:
        """Returns the percentiles of times in seconds."""
        return cls(*(1e3 * float(each) for each in np.percentile(times_s, (50, 90, 99))))


@dataclass(frozen=True)
class Decoding:
    """How the engine answers `rows` requests at once: tokens of all of them per second, with the time for their short
    prompts; the time from a request to its first token, and from one token to the next."""

    rows: int
    tokens_per_s: float
    first_token_ms: Percentiles
    inter_token_ms: Percentiles


@dataclass(frozen=True)
class Measurement:
    """What was measured of a version on this machine; `threads` is None on a GPU.

    `weights_bytes` is the size of the parameters, and `memory_bytes` that of the weights in the form in which they
    decode and of all `slots`, each with a whole context. On a CPU and on an NVIDIA GPU a slot takes memory only as its
    tokens arrive.
    """

    device: str
    threads: int | None
    slots: int
    weight_format: WeightFormat
    prefill_tokens_per_s: float
    decoding: tuple[Decoding, ...]
    weights_bytes: int
    cache_bytes_per_token: int
    memory_bytes: int
    resident_bytes: int


# The time of a request, and the times of its tokens.
_Answer = tuple[float, list[float]]


class _Client:
    """Sends rounds of requests to an engine, with prompts of random tokens, and waits until all of them have ended."""

    def __init__(self, engine: Engine, outputs: "SimpleQueue[list[Output]]", vocabulary_size: int) -> None:
        self._engine = engine
        self._outputs = outputs
        self._vocabulary_size = vocabulary_size
        self._random = np.random.default_rng(0)
        self._ids = count()

    def round(self, rows: int, prompt_tokens: int, output_tokens: int) -> list[_Answer]:
        """Sends a round and returns its answers. Raises the error of a request that failed."""
        answers: dict[str, _Answer] = {}
        for _ in range(rows):
            number = next(self._ids)
            request = GenerationRequest(
                id=str(number),
                version=0,
                prompt=tuple(self._random.integers(self._vocabulary_size, size=prompt_tokens).tolist()),
                seed=number,
                max_tokens=output_tokens,
                arrived=time.monotonic(),
                ignore_eos=True,
            )
            answers[request.id] = (request.arrived, [])
            self._engine.submit(request)
        running = rows
        while running:
            for output in self._outputs.get():
                match output.event:
                    case Delta(times=times):
                        answers[output.request_id][1].extend(times)
                    case Finished():
                        running -= 1
                    case Failed(error=error):
                        raise error
        return list(answers.values())

    def rounds(self, rows: int, prompt_tokens: int, output_tokens: int) -> Iterator[list[_Answer]]:
        """Yields rounds for a while, after one that does not count."""
        self.round(rows, prompt_tokens, min(output_tokens, _WARM_TOKENS))
        end_s = time.monotonic() + _LEAST_S
        while True:
            yield self.round(rows, prompt_tokens, output_tokens)
            if time.monotonic() >= end_s:
                return


def measure(
    folder: Path,
    rows: Sequence[int],
    settings: Settings,
    device: Accelerator,
    show: Callable[[str], object],
) -> Measurement:
    """Measures the version in a folder, for each number of requests at once, and shows a line about each part.

    Raises `CorruptCheckpoint` if the folder holds no version that can be read, and `FailedPrecondition` if its context
    is too short.
    """
    weights = weights_on(device.backend, settings.weights)
    config = GPTConfig.from_dict(VersionManifest.read(folder).model)
    if config.context_length < _LEAST_CONTEXT:
        raise FailedPrecondition(
            f"The speed of a version whose context has {config.context_length} tokens cannot be measured: it needs at "
            f"least {_LEAST_CONTEXT}."
        )
    model, tokenizer = read_model(folder, config), read_tokenizer(folder)
    parameters: Any = tree_flatten(model.parameters())
    # A decoder has at least two slots.
    slots = max(*rows, 2)
    decoder = DecoderFactory(slots, settings.threads, device.cache, weights).make(model)
    outputs: SimpleQueue[list[Output]] = SimpleQueue()
    prefill_tokens = settings.prefill_tokens or prefill_tokens_on(device.backend)
    engine = Engine(slots, prefill_tokens, settings.prefix_cache_mib << 20, outputs.put, lambda: None)
    engine.start()
    try:
        engine.add_version(0, decoder, tokenizer, config.context_length).result()
        client = _Client(engine, outputs, config.vocabulary_size)
        prefill = _prefill_tokens_per_s(client, config.context_length)
        show(f"reading a prompt: {prefill:,.0f} tokens/s")
        decoding = []
        for each in rows:
            decoding.append(_decoding(client, each, config.context_length))
            show(f"{each} requests at once: {decoding[-1].tokens_per_s:,.0f} tokens/s")
        return Measurement(
            device=device.device,
            threads=settings.threads if device.backend == "cpu" else None,
            slots=slots,
            weight_format=decoder.weights,
            prefill_tokens_per_s=prefill,
            decoding=tuple(decoding),
            weights_bytes=sum(array.nbytes for _, array in parameters),
            cache_bytes_per_token=decoder.bytes_per_token,
            memory_bytes=decoder.memory_bytes,
            resident_bytes=accelerator.memory().resident_bytes,
        )
    finally:
        engine.stop()


def _prefill_tokens_per_s(client: _Client, context_length: int) -> float:
    """Returns how many tokens of a long prompt are read a second, if nothing else runs."""
    tokens = min(context_length - 1, _LONG_PROMPT_TOKENS)
    times_s = [times[0] - arrived for answers in client.rounds(1, tokens, 1) for arrived, times in answers]
    return len(times_s) * tokens / sum(times_s)


def _decoding(client: _Client, rows: int, context_length: int) -> Decoding:
    prompt_tokens = min(_PROMPT_TOKENS, context_length // 3)
    output_tokens = min(_OUTPUT_TOKENS, context_length - prompt_tokens)
    first_s, between_s, whole_s, tokens = [], [], 0.0, 0
    for answers in client.rounds(rows, prompt_tokens, output_tokens):
        for arrived, times in answers:
            first_s.append(times[0] - arrived)
            between_s += [later - earlier for earlier, later in pairwise(times)]
            tokens += len(times)
        whole_s += max(times[-1] for _, times in answers) - min(arrived for arrived, _ in answers)
    return Decoding(rows, tokens / whole_s, Percentiles.of(first_s), Percentiles.of(between_s))
