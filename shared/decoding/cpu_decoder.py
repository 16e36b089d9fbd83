"""Computes prompts and decodes on a CPU; the work is in `cpu_decoder.cpp`.

A step has many small operations, and uses each weight once for few rows. MLX's CPU backend spends more time between
such operations than in them, and its products first copy a whole weight into another order.
Shapes: R rows, N outputs, T tokens, S positions of the context, H heads, D head width, C width, V vocabulary.
"""

import ctypes
import errno
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.decoding.multi_step import DecodeRow, decode_step_by_step
from shared.decoding.sampling import Logits, TemperatureSampling, is_finite, log_probabilities, uniform
from shared.decoding.spans import Span
from shared.device.native import build_library, prebuild_library

if TYPE_CHECKING:
    from shared.gpt.model import GPT

Array = NDArray[np.float32]

_FLOATS = ctypes.POINTER(ctypes.c_float)


class _Affine(ctypes.Structure):
    """A product's packed weight, or a norm's weight, each with its bias."""

    _fields_ = [("weight", _FLOATS), ("bias", _FLOATS)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Affine) for name in ("attention_norm", "qkv", "output", "feed_forward_norm", "up", "down")),
        *((name, _FLOATS) for name in ("keys", "values")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("layers", "width", "hidden", "heads", "positions", "vocabulary", "threads")
        ),
        ("epsilon", ctypes.c_float),
        *((name, _FLOATS) for name in ("tokens", "places")),
        *((name, _Affine) for name in ("norm", "head")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


def _small_pages(shape: tuple[int, ...]) -> Array:
    """Returns zeros that take memory only when they are written, page by page.

    NumPy asks for huge pages, with which the first step of a slot would wait until the system has cleared megabytes.
    """
    memory = mmap.mmap(-1, math.prod(shape) * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
    return np.frombuffer(memory, np.float32).reshape(shape)


class CpuDecoder:
    """An evaluated model with keys and values for a number of slots, (slots, H, S, D) in each layer.

    The logits of a span are the same bit for bit, whatever else is in a step, whatever the number of threads, and in
    whatever chunks the prompt is computed.
    """

    def __init__(self, model: "GPT", slots: int, threads: int, library: ctypes.CDLL) -> None:
        config = model.config
        self._library = library
        # The arrays behind the pointers.
        self._held: list[Array] = []
        shape = (2, slots, config.heads, config.context_length, config.head_width)
        self._caches = [_small_pages(shape) for _ in range(config.layers)]
        self._buffers = {"scratch": np.empty(0, np.float32), "logits": np.empty(0, np.float32)}
        layers = (_Layer * config.layers)()
        for layer, block, (keys, values) in zip(layers, model.blocks, self._caches, strict=True):
            layer.attention_norm = self._norm(block.attention_norm)
            layer.qkv = self._product(block.attention.qkv.weight, block.attention.qkv.bias)
            layer.output = self._product(block.attention.output.weight, block.attention.output.bias)
            layer.feed_forward_norm = self._norm(block.feed_forward_norm)
            layer.up = self._product(block.feed_forward.up.weight, block.feed_forward.up.bias)
            layer.down = self._product(block.feed_forward.down.weight, block.feed_forward.down.bias)
            layer.keys, layer.values = self._pointer(keys), self._pointer(values)
        self._model = _Model(
            layers=config.layers,
            width=config.width,
            hidden=config.hidden_width,
            heads=config.heads,
            positions=config.context_length,
            vocabulary=config.vocabulary_size,
            threads=threads,
            epsilon=model.final_norm.eps,
            tokens=self._pointer(model.token_embedding.weight),
            places=self._pointer(model.position_embedding.weight),
            norm=self._norm(model.final_norm),
            head=self._product(model.head_weight, None),
            layer=layers,
        )

    def _norm(self, norm: Any) -> _Affine:
        return _Affine(self._pointer(norm.weight), self._pointer(norm.bias))

    def _product(self, weight: mx.array, bias: mx.array | None) -> _Affine:
        """Packs a weight (N, C) in blocks of outputs, (N / block, C, block), and its bias, both padded with zeros."""
        block = self._library.block_size()
        N, C = weight.shape
        missing = -N % block
        packed = np.pad(np.asarray(weight), ((0, missing), (0, 0))).reshape(-1, block, C).swapaxes(1, 2)
        return _Affine(
            self._pointer(packed), None if bias is None else self._pointer(np.pad(np.asarray(bias), (0, missing)))
        )

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights and of all slots."""
        return sum(array.nbytes for array in self._held)

    def _pointer(self, array: Any) -> Any:
        held = np.ascontiguousarray(array, np.float32)
        self._held.append(held)
        return held.ctypes.data_as(_FLOATS)

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""
        return sum(layer[:, 0, :, 0].nbytes for layer in self._caches)

    @property
    def max_decode_steps(self) -> int:
        """One: a step takes much longer than its caller needs between two of them."""
        return 1

    def warm_up(self) -> Iterator[None]:
        """Does nothing: the library takes any shape."""
        return iter(())

    def forward(self, spans: Sequence[Span]) -> Sequence[Logits]:
        """Computes spans and returns the logits (V,) after the last token of each, valid until the next call."""
        return self._compute(spans, np.cumsum([len(span.tokens) for span in spans], dtype=np.intc) - np.intc(1))

    def logits(self, span: Span) -> tuple[Array, Logits]:
        """Returns the logits (T, V) after each token of a span, valid until the next call, and those after the last."""
        rows = self._compute([span], np.arange(len(span.tokens), dtype=np.intc))
        return np.asarray(rows), rows[-1].copy()

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Returns the loss in nats of the token after each token of a span."""
        rows = self._compute([span], np.arange(len(span.tokens), dtype=np.intc))
        return [
            -float(log_probabilities(row)[target]) if is_finite(row) else math.nan
            for row, target in zip(rows, targets, strict=True)
        ]

    def _compute(self, spans: Sequence[Span], wanted: NDArray[np.intc]) -> list[Logits]:
        """Computes spans and returns the logits (V,) after the wanted (K,) of all tokens."""
        rows = np.array(
            [(token, span.slot, position) for span in spans for position, token in enumerate(span.tokens, span.start)],
            np.intc,
        ).T.copy()  # (3, R)
        scratch = self._buffer("scratch", self._library.scratch_size(ctypes.byref(self._model), rows.shape[1]))
        V = self._model.vocabulary
        K = len(wanted)
        logits = self._buffer("logits", K * (V + -V % self._library.block_size())).reshape(K, -1)
        self._library.forward(
            *(ctypes.byref(self._model), rows.shape[1], *(row.ctypes.data for row in rows)),
            *(K, wanted.ctypes.data, scratch.ctypes.data, logits.ctypes.data),
        )
        return [row[:V] for row in logits]

    def _buffer(self, name: str, size: int) -> Array:
        """Returns memory that is reused in the next step: new pages would often cost more than the step."""
        if self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, np.float32)
        return self._buffers[name][:size]

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws a token for each row; None if its logits are not finite."""
        pointers = (ctypes.c_void_p * len(rows))(*(row.logits.ctypes.data for row in rows))
        masked = np.array([-1 if row.masked is None else row.masked for row in rows], np.intc)
        inverse = np.array([row.inverse_temperature for row in rows], np.float32)
        numbers = np.array([uniform(row.seed, row.position) for row in rows], np.float64)
        tokens = np.empty(len(rows), np.intc)
        arrays = (array.ctypes.data for array in (masked, inverse, numbers, tokens))
        self._library.draw(self._model.threads, len(rows), self._model.vocabulary, pointers, *arrays)
        return [None if token < 0 else token for token in tokens.tolist()]

    def decode(self, rows: Sequence[DecodeRow], steps: int, next_steps: int = 0) -> list[list[int | None]]:
        """Draws several tokens for each row."""
        return decode_step_by_step(self, rows, steps, self._model.positions)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot to other slots."""
        for layer in self._caches:
            for target in targets:
                layer[:, target, :, :length] = layer[:, source, :, :length]

    def read(self, slot: int, start: int, end: int) -> list[Array]:
        """Returns a copy (2, H, T, D) of each layer's keys and values of a slot from one position to another."""
        return [layer[:, slot, :, start:end].copy() for layer in self._caches]

    def write(self, slot: int, start: int, block: list[Array]) -> None:
        """Writes a block that `read` returned to a slot."""
        for layer, read in zip(self._caches, block, strict=True):
            layer[:, slot, :, start : start + read.shape[2]] = read

    def clear(self, slot: int) -> None:
        """Does nothing: no row uses numbers beyond its own position."""

    def reset(self) -> None:
        """Does nothing: a slot is always written before it is read."""


_OPTIONS = ("-std=c++17", "-O3", "-march=native", *(("-fopenmp",) if sys.platform == "linux" else ()))


def load_library(cache: Path) -> ctypes.CDLL:
    """Loads the library of `cpu_decoder.cpp`, and builds it for this processor in the folder `cache` if that is needed.

    Raises `FailedPrecondition` as `build_library` does.
    """
    library = ctypes.CDLL(str(build_library(_source(), "c++", _OPTIONS, cache)))
    model, pointer = ctypes.POINTER(_Model), ctypes.c_void_p
    library.scratch_size.argtypes = [model, ctypes.c_int]
    library.scratch_size.restype = ctypes.c_size_t
    library.forward.argtypes = [model, ctypes.c_int, *[pointer] * 3, ctypes.c_int, *[pointer] * 3]
    library.forward.restype = None
    library.draw.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, *[pointer] * 5]
    library.draw.restype = None
    return library


def prebuild(folder: Path) -> None:
    """Builds the library for each kind of processor; raises `FailedPrecondition` as `prebuild_library` does."""
    prebuild_library(_source(), "c++", _OPTIONS, folder)


def _source() -> str:
    return Path(__file__).with_suffix(".cpp").read_text()
