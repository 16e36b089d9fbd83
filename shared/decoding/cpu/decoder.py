"""Computes prompts and decodes on a CPU; the work is in `step.cpp`.

A step has many small operations, and uses each weight once for few rows. MLX's CPU backend spends more time between
such operations than in them, and its products first copy a whole weight into another order.
Shapes: R rows, N outputs, T tokens, S positions of the context, H heads, D head width, C width, V vocabulary, W numbers
of a vector.
"""

import ctypes
import errno
import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import DTypeLike, NDArray

from shared.decoding.cpu.library import CACHE_LINE, FORMATS, CpuLibrary, Layer, Model, Norm, Product
from shared.decoding.multi_step import DecodeRow, decode_step_by_step
from shared.decoding.sampling import Logits, TemperatureSampling, is_finite, log_probabilities, uniform
from shared.decoding.spans import Span
from shared.decoding.weight_format import WeightFormat

if TYPE_CHECKING:
    from shared.gpt.model import GPT

Array = NDArray[Any]


def _small_pages(shape: tuple[int, ...], dtype: DTypeLike, behind: int = 0) -> Array:
    """Returns zeros that take memory only when they are written, page by page. `behind` more can be read after them.

    NumPy asks for huge pages, with which the first step of a slot would wait until the system has cleared megabytes.
    """
    count = math.prod(shape)
    size = (count + behind) * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        try:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel without huge pages
                raise
    return np.frombuffer(memory, dtype, count).reshape(shape)


class CpuDecoder:
    """An evaluated model with keys (slots, H, S / W, D, W) and values (slots, H, S, D) in each layer.

    The logits of a span are the same bit for bit, whatever else is in a step, whatever the number of threads, and in
    whatever chunks the prompt is computed.
    """

    def __init__(self, model: "GPT", slots: int, threads: int, library: CpuLibrary, weights: WeightFormat) -> None:
        config = model.config
        self._weights = weights
        self._library = library
        # The arrays behind the pointers.
        self._held: list[Array] = []
        S, H, D, W = config.context_length, config.heads, config.head_width, library.vector_width
        number = np.float32 if weights is WeightFormat.FP32 else np.uint16
        self._caches = [
            (_small_pages((slots, H, -(-S // W), D, W), number), _small_pages((slots, H, S, D), number, behind=W))
            for _ in range(config.layers)
        ]
        # All weights in one piece, for which NumPy asks for huge pages: through them a processor reads faster.
        C, F, V = config.width, config.hidden_width, config.vocabulary_size
        shapes = [(V, C)] * (1 if config.tied_head else 2) + [(3 * C, C), (C, C), (F, C), (C, F)] * config.layers
        size = sum(library.packed_size(weights, shape) for shape in shapes)
        packed = np.zeros(size + CACHE_LINE, np.uint8)
        self._unpacked = packed[-packed.ctypes.data % CACHE_LINE :]
        self._buffers: dict[str, Array] = {"scratch": np.empty(0, np.uint8), "logits": np.empty(0, np.float32)}
        layers = (Layer * config.layers)()
        for layer, block, (keys, values) in zip(layers, model.blocks, self._caches, strict=True):
            layer.attention_norm = self._norm(block.attention_norm)
            layer.qkv = self._product(block.attention.qkv.weight, block.attention.qkv.bias)
            layer.output = self._product(block.attention.output.weight, block.attention.output.bias)
            layer.feed_forward_norm = self._norm(block.feed_forward_norm)
            layer.up = self._product(block.feed_forward.up.weight, block.feed_forward.up.bias)
            layer.down = self._product(block.feed_forward.down.weight, block.feed_forward.down.bias)
            layer.keys, layer.values = self._hold(keys), self._hold(values)
        tokens = self._product(model.token_embedding.weight)
        self._model = Model(
            format=FORMATS[weights],
            layers=config.layers,
            width=config.width,
            hidden=config.hidden_width,
            heads=config.heads,
            positions=config.context_length,
            vocabulary=config.vocabulary_size,
            threads=threads,
            epsilon=model.final_norm.eps,
            tokens=tokens,
            places=self._floats(model.position_embedding.weight),
            norm=self._norm(model.final_norm),
            head=tokens if config.tied_head else self._product(model.head_weight),
            layer=layers,
        )

    def _norm(self, norm: Any) -> Norm:
        return Norm(self._floats(norm.weight), self._floats(norm.bias))

    def _product(self, weight: mx.array, bias: mx.array | None = None) -> Product:
        """Packs a weight (N, C) and its bias."""
        size = self._library.packed_size(self._weights, weight.shape)
        packed, self._unpacked = self._unpacked[:size], self._unpacked[size:]
        scales = self._library.pack(self._weights, np.ascontiguousarray(weight, np.float32), packed)
        missing = self._library.padded_size(weight.shape[0]) - weight.shape[0]
        return Product(
            self._hold(packed),
            None if scales is None else self._hold(scales),
            None if bias is None else self._floats(np.pad(np.asarray(bias), (0, missing))),
        )

    def _floats(self, array: Any) -> int:
        return self._hold(np.ascontiguousarray(array, np.float32))

    def _hold(self, array: Array) -> int:
        """Keeps an array, and returns its address."""
        self._held.append(array)
        return array.ctypes.data

    @property
    def weights(self) -> WeightFormat:
        """The format in which it computes with the weights."""
        return self._weights

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights and of all slots."""
        return sum(array.nbytes for array in self._held)

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""
        return sum(2 * values[0, :, 0].nbytes for _, values in self._caches)

    @property
    def max_decode_steps(self) -> int:
        """One: a step takes much longer than its caller needs between two of them."""
        return 1

    def warm_up(self) -> Iterator[None]:
        """Does nothing: the library takes any shape."""
        return iter(())

    def forward(self, spans: Sequence[Span]) -> Sequence[Logits]:
        """Computes spans and returns the logits (V,) after the last token of each, valid until the next call."""
        ends = accumulate(len(span.tokens) for span in spans)
        return self._compute(spans, np.array([end - 1 for end in ends], np.intc))

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
        logits = self._buffer("logits", K * self._library.padded_size(V)).reshape(K, -1)
        self._library.compute(
            *(ctypes.byref(self._model), rows.shape[1], *(row.ctypes.data for row in rows)),
            *(K, wanted.ctypes.data, scratch.ctypes.data, logits.ctypes.data),
        )
        return [row[:V] for row in logits]

    def _buffer(self, name: str, size: int) -> Array:
        """Returns memory that is reused in the next step: new pages would often cost more than the step."""
        if self._buffers[name].size < size:
            self._buffers[name] = np.empty(size, self._buffers[name].dtype)
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
        for keys, values in self._caches:
            for target in targets:
                keys[target, :, : self._key_blocks(length)] = keys[source, :, : self._key_blocks(length)]
                values[target, :, :length] = values[source, :, :length]

    def read(self, slot: int, start: int, end: int) -> list[tuple[Array, Array]]:
        """Returns a copy of each layer's keys and values of a slot from one position to another."""
        blocks = slice(self._key_blocks(start), self._key_blocks(end))
        return [(keys[slot, :, blocks].copy(), values[slot, :, start:end].copy()) for keys, values in self._caches]

    def write(self, slot: int, start: int, block: list[tuple[Array, Array]]) -> None:
        """Writes a block that `read` returned to a slot."""
        first = self._key_blocks(start)
        for (keys, values), (read_keys, read_values) in zip(self._caches, block, strict=True):
            keys[slot, :, first : first + read_keys.shape[1]] = read_keys
            values[slot, :, start : start + read_values.shape[1]] = read_values

    def _key_blocks(self, length: int) -> int:
        """Returns in how many blocks the keys of `length` positions are."""
        return -(-length // self._library.vector_width)

    def clear(self, slot: int) -> None:
        """Does nothing: no row uses numbers beyond its own position."""

    def reset(self) -> None:
        """Does nothing: a slot is always written before it is read."""
