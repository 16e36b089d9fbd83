"""A decoder: a model with a KV cache for a fixed number of slots, in the form that suits the device."""

import logging
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.cpu.library import CpuLibrary, load_library
from shared.decoding.cuda.decoder import LEAST_CAPABILITY, CudaDecoder
from shared.decoding.cuda.program import supports
from shared.decoding.mlx_decoder import MlxDecoder, ProgramCache
from shared.decoding.multi_step import DecodeRow
from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import Span
from shared.decoding.weight_format import WeightFormat
from shared.device.cuda_driver import CudaDriver, KernelsError
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu

logger = logging.getLogger(__name__)

# On an NVIDIA GPU, launching many small kernels takes most of the time of a span, and eight take as long as one.
_CUDA_SPANS_TOGETHER = 8


class Decoder(Protocol):
    """An evaluated model and its slots. The logits of a span depend only on the tokens of its slot up to its end.

    Any thread may create it; a single thread makes all calls.
    """

    @property
    def weights(self) -> WeightFormat:
        """The format in which it computes with the weights."""

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights, and of all slots when they are full."""

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""

    @property
    def max_decode_steps(self) -> int:
        """The most steps that a caller should ask of `decode`; 1 if `forward` and `draw` are as fast."""

    def warm_up(self) -> Iterator[None]:
        """Compiles and loads, in small parts, everything for which the first calls would wait otherwise."""

    def forward(self, spans: Sequence[Span]) -> Sequence[Any]:
        """Computes spans and returns the logits after the last token of each, for `draw` or `np.asarray`, then (V,).

        The logits are valid until the next call. A span of several tokens begins at a multiple of `SPAN_TOKENS` and has
        at most that many. Spans of one slot are consecutive, and only the last of them may have one token.
        """

    def logits(self, span: Span) -> tuple[NDArray[np.float32], Any]:
        """Computes a span, and returns the logits (T, V) after each of its tokens, which are valid until the next call,
        and those after the last one, for `draw` or `np.asarray`, which stay valid.

        The span is as in `forward`.
        """

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Computes a span and returns for each of its tokens the loss in nats of the next one, given in `targets`.

        A loss is not finite if a logit is not. The span has `SPAN_TOKENS` or `SCORED_TOKENS` tokens and begins at a
        multiple of that; the last one of a text may be shorter.
        """

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws a token for each row; None if its logits are not finite."""

    def decode(self, rows: Sequence[DecodeRow], steps: int, next_steps: int = 0) -> list[list[int | None]]:
        """Draws up to `steps` tokens, at most `MAX_DECODE_STEPS`, for each row, each after the one before.

        Returns a list for each row. It ends early if the context is full, and with None at the first logits that are
        not finite. `next_steps` is a hint: the next call will probably ask for that many tokens, for the rows that go
        on. The decoder may begin with them.
        """

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot to other slots."""

    def read(self, slot: int, start: int, end: int) -> Any:
        """Returns a copy of the keys and values of a slot from one position to another, for `write`.

        `start` is a multiple of `SPAN_TOKENS`.
        """

    def write(self, slot: int, start: int, block: Any) -> None:
        """Writes a block that `read` returned to a slot, at the position from which it was read."""

    def clear(self, slot: int) -> None:
        """Removes numbers that are not finite from a slot."""

    def reset(self) -> None:
        """Discards the content of all slots."""


class DecoderFactory:
    """Makes a decoder with `slots` slots for each model, in the form that suits the device.

    On a CPU a step runs in `threads` threads, on weights in the format `weights`, which a GPU does not need. What is
    compiled for a CPU or an NVIDIA GPU is kept in the folder `cache`; decoders in MLX share their compiled programs if
    their models have one configuration.
    """

    def __init__(self, slots: int, threads: int, cache: Path, weights: WeightFormat | None) -> None:
        self._slots = slots
        self._threads = threads
        self._cache = cache
        self._weights = weights
        self._programs = ProgramCache()
        # The NVIDIA GPU of each decoder that has one.
        self._gpus: tuple[weakref.ref[CudaDriver], ...] = ()

    def make(self, model: GPT) -> Decoder:
        """Returns the decoder of an evaluated model. May be called from any one thread.

        Raises `CudaError` if an NVIDIA GPU has too little memory.
        """
        if on_cpu():
            assert self._weights is not None
            return CpuDecoder(model, self._slots, self._threads, self._library, self._weights)
        if mx.cuda.is_available() and supports(model.config):
            gpu = CudaDriver(self._cache)
            if gpu.capability >= LEAST_CAPABILITY:
                # MLX keeps freed memory for itself.
                mx.clear_cache()
                self._gpus = (*(each for each in self._gpus if each() is not None), weakref.ref(gpu))
                try:
                    return CudaDecoder(model, self._slots, gpu)
                except KernelsError as error:
                    logger.warning("MLX decodes, several times slower than our kernels, because: %s", str(error))
        spans_together = _CUDA_SPANS_TOGETHER if mx.cuda.is_available() else 1
        return MlxDecoder(model, self._slots, self._programs, spans_together)

    def prepare(self) -> None:
        """Compiles the library that all decoders on a CPU share, which takes seconds the first time; else the first
        `make` does so.

        May be called from any one thread. Raises `FailedPrecondition` if that is not possible.
        """
        if on_cpu():
            _ = self._library

    @property
    def gpu_bytes(self) -> int:
        """The memory of an NVIDIA GPU that decoders hold beside MLX's arrays. Any thread may read it."""
        return sum(gpu.allocated_bytes for each in self._gpus if (gpu := each()) is not None)

    @property
    def compiled_shapes(self) -> int:
        """The number of programs that were compiled, each for arguments of one shape. Any thread may read it."""
        return self._programs.compiled_shapes

    @cached_property
    def _library(self) -> CpuLibrary:
        return load_library(self._cache)
