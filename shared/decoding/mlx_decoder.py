"""Computes prompts and decodes in MLX, for a GPU: compiled programs of few shapes, which take the weights as arguments.

Shapes: B slots, R spans together, T tokens, S positions of the cache, H heads, D head width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from shared.decoding.multi_step import DecodeRow, decode_step_by_step
from shared.decoding.sampling import Logits, TemperatureSampling, uniform
from shared.decoding.spans import SCORED_TOKENS, SPAN_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, Attend

# Spans are padded to one of these lengths.
_LENGTHS = (SCORED_TOKENS, SPAN_TOKENS)

# A draw first finds its block of this many tokens, by the sums of their weights.
_DRAW_BLOCK = 256

# A layer's keys and values, (B, H, S, D) each.
Cache = tuple[mx.array, mx.array]
Caches = list[Cache]

# Spans of one padded length: tokens (R, T); slots, starts and lengths, (R,) each.
_Spans = tuple[mx.array, mx.array, mx.array, mx.array]


class MlxDecoder:
    """An evaluated model with keys and values for at least two slots.

    Every step decodes all slots, and a program computes `spans_together` spans of several tokens. So each kind of
    product always has the same number of rows: a GPU would compute another number in another way, with other digits.
    """

    def __init__(self, model: GPT, slots: int, programs: "ProgramCache", spans_together: int = 1) -> None:
        assert slots >= 2
        config = model.config
        self._parameters = model.parameters()
        self._type = model.final_norm.weight.dtype
        self._context_length = config.context_length
        positions = -(-config.context_length // SPAN_TOKENS) * SPAN_TOKENS
        self._shape = (slots, config.heads, positions, config.head_width)
        self._layers = config.layers
        self._spans_together = spans_together
        self._programs = programs.get(config)
        self._caches: Caches = []
        # The position of the next token of each slot. Steps also write there in slots that do not decode.
        self._filled: list[int] = []
        self.reset()

    @property
    def weights(self) -> WeightFormat:
        """The type of the model's parameters."""
        return WeightFormat.FP32 if self._type == mx.float32 else WeightFormat.BF16

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights and of all slots."""
        named: Any = tree_flatten((self._parameters, self._caches))
        return sum(array.nbytes for _, array in named)

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""
        _, heads, _, width = self._shape
        return self._layers * 2 * heads * width * self._type.size

    @property
    def max_decode_steps(self) -> int:
        """One: a step takes much longer than its caller needs between two of them."""
        return 1

    def warm_up(self) -> Iterator[None]:
        """Compiles a program for each shape."""
        # Twice: MLX compiles a thread's first program again at its next call.
        for length in 2 * (*_LENGTHS, 1):
            (row,) = self.forward([Span(0, 0, (0,) * min(length, self._context_length))])
            self.draw([TemperatureSampling(row, 1.0, seed=0, position=0, masked=None)])
            yield
        for length in 2 * _LENGTHS:
            count = min(length, self._context_length)
            self.score(Span(0, 0, (0,) * count), (0,) * count)
            yield
            self.logits(Span(0, 0, (0,) * count))
            yield
        self.reset()

    def forward(self, spans: Sequence[Span]) -> Sequence["_Row"]:
        """Computes spans and returns the logits (V,) after each, on the device until `np.asarray` reads them."""
        rows: dict[int, _Row] = {}
        # Only the last span of a slot can be short. A program stores all its spans before it attends to any.
        for length in reversed(_LENGTHS):
            prefilling = [
                index for index, span in enumerate(spans) if len(span.tokens) > 1 and _padded_length(span) == length
            ]
            for first in range(0, len(prefilling), self._spans_together):
                indices = prefilling[first : first + self._spans_together]
                block = self._prefill([spans[index] for index in indices])  # (R, V)
                rows |= {index: _Row(block, place) for place, index in enumerate(indices)}
        for span in spans:
            self._filled[span.slot] = span.start + len(span.tokens)
        decoding = {index: span for index, span in enumerate(spans) if len(span.tokens) == 1}
        if decoding:
            block = self._decode(list(decoding.values()))  # (B, V)
            rows |= {index: _Row(block, span.slot) for index, span in decoding.items()}
        return [rows[index] for index in range(len(spans))]

    def logits(self, span: Span) -> tuple[Logits, "_Row"]:
        """Returns the logits (T, V) after each token of a span, and those after the last one, on the device."""
        count = len(span.tokens)
        logits = self._run(self._programs.logits, _padded_spans([span]))  # (T, V)
        self._filled[span.slot] = span.start + count
        # The shape that `_prefill` returns, for which the program that draws is compiled.
        last = mx.broadcast_to(logits[count - 1], (self._spans_together, logits.shape[1]))
        return np.asarray(logits)[:count], _Row(last, 0)

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Returns the loss in nats of the token after each token of a span."""
        count = len(span.tokens)
        wanted = mx.array([*targets, *[0] * (_padded_length(span) - count)])
        losses = self._run(self._programs.score, _padded_spans([span]), wanted)
        self._filled[span.slot] = span.start + count
        return [float(loss) for loss in np.asarray(losses)[:count]]

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws a token for each row; None if its logits are not finite."""
        blocks: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            blocks.setdefault(id(row.logits.block), []).append(number)
        drawn: list[int | None] = [None] * len(rows)
        for numbers in blocks.values():
            block = rows[numbers[0]].logits.block
            # Several draws from one row, such as those of the samples of one prompt, take turns.
            while numbers:
                turn = {rows[number].logits.index: number for number in reversed(numbers)}
                for number, token in zip(turn.values(), self._draw(block, turn, rows), strict=True):
                    drawn[number] = token
                numbers = [number for number in numbers if number not in turn.values()]
        return drawn

    def _draw(self, block: mx.array, turn: dict[int, int], rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws at most one token for each row of a block (B, V)."""
        B = block.shape[0]
        inverse, uniforms, masked = np.zeros(B, np.float32), np.zeros(B, np.float32), np.full(B, -1, np.int32)
        for index, number in turn.items():
            row = rows[number]
            inverse[index] = row.inverse_temperature
            uniforms[index] = uniform(row.seed, row.position)
            masked[index] = -1 if row.masked is None else row.masked
        drawn = self._programs.draw(block, *(mx.array(each) for each in (inverse, uniforms, masked)))
        tokens: list[int] = np.asarray(drawn).tolist()
        return [None if tokens[index] < 0 else tokens[index] for index in turn]

    def decode(self, rows: Sequence[DecodeRow], steps: int, next_steps: int = 0) -> list[list[int | None]]:
        """Draws several tokens for each row."""
        return decode_step_by_step(self, rows, steps, self._context_length)

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot to other slots."""
        block = self.read(source, 0, length)
        for target in targets:
            self.write(target, 0, block)

    def read(self, slot: int, start: int, end: int) -> Caches:
        """Returns a copy (H, T, D) of each layer's keys and values of a slot from one position to another."""
        block = [
            (mx.contiguous(keys[slot, :, start:end]), mx.contiguous(values[slot, :, start:end]))
            for keys, values in self._caches
        ]
        mx.eval(block)
        return block

    def write(self, slot: int, start: int, block: Caches) -> None:
        """Writes a block that `read` returned to a slot."""
        end = start + block[0][0].shape[1]
        for (keys, values), (read_keys, read_values) in zip(self._caches, block, strict=True):
            keys[slot, :, start:end] = read_keys
            values[slot, :, start:end] = read_values
        mx.eval(self._caches)
        self._filled[slot] = end

    def clear(self, slot: int) -> None:
        """Overwrites a slot: NaN would reach its next sequence in spite of the attention mask."""
        for keys, values in self._caches:
            keys[slot] = 0.0
            values[slot] = 0.0
        mx.eval(self._caches)

    def reset(self) -> None:
        """Discards the content of all slots."""
        self._caches = [
            (mx.zeros(self._shape, self._type), mx.zeros(self._shape, self._type)) for _ in range(self._layers)
        ]
        mx.eval(self._caches)
        self._filled = [0] * self._shape[0]

    def _prefill(self, spans: Sequence[Span]) -> mx.array:
        """Computes spans, padded by repeating the last one, and returns the logits (R, V) after each."""
        missing = self._spans_together - len(spans)
        return self._run(self._programs.prefill, _padded_spans([*spans, *[spans[-1]] * missing]))

    def _decode(self, rows: Sequence[Span]) -> mx.array:
        """Decodes one token per row and returns the logits (B, V) of all slots."""
        tokens = [0] * len(self._filled)
        positions = [min(filled, self._context_length - 1) for filled in self._filled]
        for span in rows:
            tokens[span.slot], positions[span.slot] = span.tokens[0], span.start
        return self._run(self._programs.decode, mx.array(tokens), mx.array(positions))

    def _run(self, program: Callable[..., Any], *arguments: mx.array | _Spans) -> mx.array:
        """Runs a program on the caches after the one before it has ended.

        MLX would copy a cache that another program still reads.
        """
        mx.eval(self._caches)
        result: mx.array
        result, self._caches = program(self._parameters, self._caches, *arguments)
        mx.async_eval(result, self._caches)
        return result


def _padded_length(span: Span) -> int:
    return next(length for length in _LENGTHS if length >= len(span.tokens))


def _padded_spans(spans: Sequence[Span]) -> _Spans:
    """Converts spans of one padded length to the arguments of the programs.

    The padding is the last token of a span, whose numbers are finite if those of the span are.
    """
    tokens = [[*span.tokens, *[span.tokens[-1]] * (_padded_length(span) - len(span.tokens))] for span in spans]
    places = [(span.slot, span.start, len(span.tokens)) for span in spans]
    slots, starts, lengths = (mx.array(each) for each in zip(*places, strict=True))
    return mx.array(tokens), slots, starts, lengths


class _Row:
    """A row of logits (B, V) that stay on the device; NumPy reads it as an array (V,)."""

    def __init__(self, block: mx.array, index: int) -> None:
        self.block = block
        self.index = index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Logits:
        return np.array(np.asarray(self.block)[self.index], dtype, copy=copy)


class ProgramCache:
    """The compiled programs of each configuration, which all decoders of models of that configuration share."""

    def __init__(self) -> None:
        self._programs: dict[GPTConfig, _Programs] = {}

    def get(self, config: GPTConfig) -> "_Programs":
        """Returns the programs of a configuration."""
        if config not in self._programs:
            self._programs[config] = _Programs(config)
        return self._programs[config]

    @property
    def compiled_shapes(self) -> int:
        """The number of programs that were compiled, each for arguments of one shape. Any thread may read it."""
        return sum(programs.count for programs in self._programs.copy().values())


class _Programs:
    """The compiled functions for models of one configuration, and a count of compilations."""

    def __init__(self, config: GPTConfig) -> None:
        self.count = 0
        # Only its structure: the weights are arguments.
        self._model = GPT(config)
        self._model.eval()
        self._scale = config.head_width**-0.5
        self._last = config.context_length - 1
        self.prefill: Callable[..., Any] = mx.compile(self._prefill)
        self.score: Callable[..., Any] = mx.compile(self._score)
        self.logits: Callable[..., Any] = mx.compile(self._logits)
        self.decode: Callable[..., Any] = mx.compile(self._decode)
        self.draw: Callable[..., mx.array] = mx.compile(self._draw)

    def _prefill(self, parameters: dict[str, Any], caches: Caches, spans: _Spans) -> tuple[mx.array, Caches]:
        """Computes spans and returns the logits (R, V) after each."""
        self.count += 1
        hidden, caches = self._compute(parameters, caches, spans)
        *_, lengths = spans
        last = mx.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]  # (R, C)
        return self._model.logits(last), caches

    def _score(
        self, parameters: dict[str, Any], caches: Caches, spans: _Spans, targets: mx.array
    ) -> tuple[mx.array, Caches]:
        """Computes one span and returns the losses (T,) of the token after each of its tokens."""
        self.count += 1
        hidden, caches = self._compute(parameters, caches, spans)
        logits = self._model.logits(hidden[0]).astype(mx.float32)  # (T, V)
        chosen = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
        losses = mx.logsumexp(logits, axis=1) - chosen
        return mx.where(mx.isfinite(logits).all(axis=1), losses, mx.nan), caches

    def _logits(self, parameters: dict[str, Any], caches: Caches, spans: _Spans) -> tuple[mx.array, Caches]:
        """Computes one span and returns the logits (T, V) after each of its tokens."""
        self.count += 1
        hidden, caches = self._compute(parameters, caches, spans)
        return self._model.logits(hidden[0]).astype(mx.float32), caches

    def _compute(self, parameters: dict[str, Any], caches: Caches, spans: _Spans) -> tuple[mx.array, Caches]:
        """Returns the hidden states (R, T, C) of spans, and the caches with their keys and values."""
        tokens, slots, starts, lengths = spans
        positions = starts[:, None] + mx.arange(tokens.shape[1])  # (R, T)
        ends = (starts + lengths)[:, None, None, None]  # (R, 1, 1, 1)

        def store(cache: mx.array, new: mx.array) -> mx.array:
            stored = cache[...]
            stored[slots[:, None], :, positions] = new.swapaxes(1, 2)  # (R, T, H, D)
            return stored

        def attend(keys: mx.array, values: mx.array, q: mx.array) -> mx.array:
            places = mx.arange(keys.shape[2])
            read = (places <= positions[:, :, None])[:, None]  # (R, 1, T, S)
            mine, values = (mx.take(array, slots, axis=0) for array in (keys, values))  # (R, H, S, D)
            # A later span of the slot may be in the same program, and NaN passes the mask.
            values = mx.where(places[:, None] < ends, values, 0.0)
            return mx.fast.scaled_dot_product_attention(q, mine, values, scale=self._scale, mask=read)

        return self._forward(parameters, caches, tokens, positions, store, attend)

    def _decode(
        self, parameters: dict[str, Any], caches: Caches, tokens: mx.array, positions: mx.array
    ) -> tuple[mx.array, Caches]:
        """Computes one token (B,) at its position (B,) for every slot, and returns the logits (B, V)."""
        self.count += 1
        index = positions[:, None, None, None]  # (B, 1, 1, 1)

        def store(cache: mx.array, new: mx.array) -> mx.array:
            return mx.put_along_axis(cache, mx.broadcast_to(index, new.shape), new, axis=2)

        def attend(keys: mx.array, values: mx.array, q: mx.array) -> mx.array:
            read = (mx.arange(keys.shape[2]) <= positions[:, None])[:, None, None]  # (B, 1, 1, S)
            return mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._scale, mask=read)

        hidden, caches = self._forward(parameters, caches, tokens[:, None], positions[:, None], store, attend)
        return self._model.logits(hidden[:, 0]), caches

    def _draw(self, logits: mx.array, inverse: mx.array, uniforms: mx.array, masked: mx.array) -> mx.array:
        """Draws tokens (B,) from logits (B, V) by random numbers in [0, 1) (B,); -1 if a logit is not finite.

        `inverse` (B,) is 1 / temperature, and 0 for the likeliest token. `masked` tokens (B,) are not drawn.
        """
        self.count += 1
        logits = logits.astype(mx.float32)
        finite = mx.isfinite(logits).all(axis=1)  # (B,)
        allowed = mx.where(mx.arange(logits.shape[1]) == masked[:, None], -mx.inf, logits)  # (B, V)
        highest = allowed.max(axis=1, keepdims=True)
        weights = mx.exp((allowed - highest) * inverse[:, None])
        weights = mx.pad(weights, [(0, 0), (0, -weights.shape[1] % _DRAW_BLOCK)])
        weights = weights.reshape(weights.shape[0], -1, _DRAW_BLOCK)  # (B, V / block, block)
        # First the block, then the token in it: short sums are more exact than long ones.
        block, left = _passed(weights.sum(axis=2), uniforms)
        chosen = mx.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]  # (B, block)
        drawn = block * _DRAW_BLOCK + _passed(chosen, left)[0]
        tokens = mx.where(inverse == 0, mx.argmax(allowed, axis=1), drawn).astype(mx.int32)
        return mx.where(finite, tokens, -1)

    def _forward(
        self,
        parameters: dict[str, Any],
        caches: Caches,
        tokens: mx.array,
        positions: mx.array,
        store: Callable[[mx.array, mx.array], mx.array],
        attend: Callable[[mx.array, mx.array, mx.array], mx.array],
    ) -> tuple[mx.array, Caches]:
        """Returns the hidden states (B, T, C) of (B, T) tokens, and the caches with their keys and values."""
        self._model.update(parameters)
        stored: Caches = []

        def attends(keys: mx.array, values: mx.array) -> Attend:
            def attend_here(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
                stored.append((store(keys, k), store(values, v)))
                return attend(*stored[-1], q)

            return attend_here

        x = self._model.embed(tokens, mx.minimum(positions, self._last))
        return self._model.through_blocks(x, [attends(*layer) for layer in caches]), stored


def _passed(weights: mx.array, shares: mx.array) -> tuple[mx.array, mx.array]:
    """Returns where (B,) the cumulated weights (B, N) of each row pass a share (B,) of their sum, and the share (B,) of
    the weight there that is still needed."""
    # Parallel sums may be rounded up or down at a weight of 0, at which no draw may stop.
    possible = weights > 0
    sums = mx.where(possible, mx.cumsum(weights, axis=1), 0)
    highest = sums.max(axis=1)
    # Below the highest sum, so that some weight passes it.
    target = mx.minimum(shares * highest, highest * (1 - 2**-23))[:, None]
    place = mx.argmax(sums > target, axis=1, keepdims=True)
    weight, after = (mx.take_along_axis(each, place, axis=1) for each in (weights, sums))
    return place[:, 0].astype(mx.int32), mx.clip((target - after + weight) / weight, 0, 1)[:, 0]
