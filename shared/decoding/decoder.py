"""What decodes: a model with keys and values for a fixed number of slots, in the form that suits the device."""

import ctypes
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from shared.decoding.cpu_decoder import CpuDecoder, load_library
from shared.decoding.mlx_decoder import MlxDecoder, ProgramCache
from shared.decoding.sampling import PlainDraw
from shared.decoding.spans import Span
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu

# On an NVIDIA GPU starting its many small kernels takes most of the time of a span, and as long for eight.
_CUDA_SPANS_TOGETHER = 8


class Decoder(Protocol):
    """An evaluated model and its slots. What a span gets depends on nothing but the tokens of its slot up to its end.

    Made on any thread; everything else happens on one.
    """

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights and of all slots."""

    @property
    def token_bytes(self) -> int:
        """The memory that a token takes in a slot."""

    def warm_up(self) -> Iterator[None]:
        """Compiles and loads, piece by piece, what the first calls of the others would wait for."""

    def forward(self, spans: Sequence[Span]) -> Sequence[Any]:
        """Reads spans; the logits after the last token of each, for `draw`, or for `np.asarray`, which makes them (V,).
        They stand there until the next call.

        A span of several tokens begins at a multiple of `SPAN_TOKENS` and has no more than so many. Spans of one slot
        follow one another, and only the last of them may have one token.
        """

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Reads a span; for each token the loss of the one that follows it, `targets`, in nats, and not finite where a
        logit is not.

        The span begins at a multiple of its length, of `SPAN_TOKENS` or `SCORED_TOKENS`; the last one of a text may be
        shorter.
        """

    def draw(self, rows: Sequence[PlainDraw]) -> list[int | None]:
        """A token for each row, None where its logits are not finite."""

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Gives slots the first `length` tokens of another one."""

    def read(self, slot: int, start: int, end: int) -> Any:
        """A copy of what the positions of a slot hold, for `write`."""

    def write(self, slot: int, start: int, piece: Any) -> None:
        """Puts what `read` returned into a slot, at the position that it was read from."""

    def clear(self, slot: int) -> None:
        """Takes numbers that are not finite out of a slot."""

    def reset(self) -> None:
        """Forgets what every slot holds."""


class DecoderFactory:
    """Makes a decoder with `slots` slots for each model, in the form that suits the device.

    On a CPU a step runs in `threads` threads, and the library that computes it is built in the folder `cache`. On a GPU
    models of one configuration share their compiled programs.
    """

    def __init__(self, slots: int, threads: int, cache: Path) -> None:
        self._slots = slots
        self._threads = threads
        self._cache = cache
        self._programs = ProgramCache()

    def make(self, model: GPT) -> Decoder:
        """Returns the decoder of an evaluated model. May be called from any one thread."""
        if on_cpu():
            return CpuDecoder(model, self._slots, self._threads, self._library)
        spans_together = _CUDA_SPANS_TOGETHER if mx.cuda.is_available() else 1
        return MlxDecoder(model, self._slots, self._programs, spans_together)

    @property
    def compiled_shapes(self) -> int:
        """The number of programs that were compiled, each for arguments of one shape. Any thread may read it."""
        return self._programs.compiled_shapes

    @cached_property
    def _library(self) -> ctypes.CDLL:
        return load_library(self._cache)
