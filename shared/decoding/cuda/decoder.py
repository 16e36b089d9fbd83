"""Computes prompts and decodes on an NVIDIA GPU.

At each step MLX builds a graph, which takes it longer than such a GPU needs to compute a small model. Here a step is a
CUDA graph, made once for each of a few numbers of rows.
Shapes: R rows, S steps, T tokens, K wanted tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.decoding.cuda.multi_step_batch import NO_TOKEN, MultiStepBatch
from shared.decoding.cuda.pages import Page, PagePool
from shared.decoding.cuda.program import DrawInput, Row, supports
from shared.decoding.cuda.steps import PendingTokens, Steps
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.sampling import (
    Logits,
    SamplingParameters,
    TemperatureSampling,
    is_finite,
    sample,
    to_bits,
    uniforms,
)
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from shared.device.cuda_driver import Gpu
from shared.gpt.model import GPT

# The kernels use instructions of this compute capability.
LEAST_CAPABILITY = (8, 0)


class CudaDecoder:
    """An evaluated model with keys and values for a number of slots, in bf16, in pages of `SPAN_TOKENS` positions.

    The logits of a span are the same bit for bit, whatever else is in a step, and in whatever chunks the prompt is
    computed.
    """

    def __init__(self, model: GPT, slots: int, gpu: Gpu) -> None:
        """Takes a model that `supports` takes. Raises `CudaError` if the GPU has too little memory."""
        config = model.config
        assert supports(config)
        gpu.use()
        self._gpu = gpu
        pages = -(-config.context_length // SPAN_TOKENS)
        self._context_length = config.context_length
        self._slots: list[list[Page | None]] = [[None] * pages for _ in range(slots)]
        # The addresses of the slots' pages.
        self._table = np.zeros((slots, pages), np.uint64)
        self._table_changed = False
        self._steps = Steps(model, gpu, self._table)
        groups = -(-config.head_width // 8)
        # What the GPU draws ahead of the next call of `decode`.
        self._ahead: _BegunBatch | None = None
        self._pool = PagePool(gpu, config.layers * 2 * config.heads * groups * 8 * SPAN_TOKENS * 2)
        gpu.wait()

    @property
    def weights(self) -> WeightFormat:
        """BF16, the format of the kernels."""
        return WeightFormat.BF16

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights, of the buffers, and of the pages of all slots when they are full."""
        return self._gpu.allocated_bytes - self._pool.memory_bytes + self._table.size * self._pool.page_bytes

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""
        return self._pool.page_bytes // SPAN_TOKENS

    @property
    def max_decode_steps(self) -> int:
        """The most that `decode` allows: the GPU needs less time for a step than the caller between two steps."""
        return MAX_DECODE_STEPS

    def warm_up(self) -> Iterator[None]:
        """Records the graphs of single tokens, and of one and of `MAX_DECODE_STEPS` draws, in any number of slots.

        Those of prompts are recorded when they come.
        """
        for count in self._steps.sizes_up_to(len(self._slots)):
            slots = range(min(count, len(self._slots)))
            self.forward([Span(slot, 0, (0,)) for slot in slots])
            rows = [DecodeRow(slot, 0, 0, 1.0, seed=0, drawn=0, masked=0, masked_draws=0) for slot in slots]
            for steps in (1, MAX_DECODE_STEPS):
                self.decode(rows, steps)
            yield
        self.reset()

    def forward(self, spans: Sequence[Span]) -> Sequence["_DeviceLogits"]:
        """Computes spans and returns the logits (V,) after each, on the GPU until `np.asarray` reads them."""
        self._compute(spans, np.cumsum([len(span.tokens) for span in spans]) - 1)
        return [_DeviceLogits(self._steps, row) for row in range(len(spans))]

    def logits(self, span: Span) -> tuple[Logits, Logits]:
        """Returns the logits (T, V) after each token of a span, and those after the last one."""
        count = len(span.tokens)
        self._compute([span], np.arange(count))
        rows = self._steps.logits(0, count)
        return rows, rows[-1]

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Returns the loss in nats of the token after each token of a span."""
        self._compute([span], np.arange(len(span.tokens)))
        draws = np.zeros(len(targets), DrawInput)
        draws["logits_row"] = np.arange(len(targets))
        draws["masked"], draws["target"], draws["inverse_temperature"] = NO_TOKEN, targets, 1.0
        return self._steps.score(draws)

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws a token for each row; None if its logits are not finite."""
        self._gpu.use()
        here = [row for row in rows if isinstance(row.logits, _DeviceLogits)]
        draws = np.zeros(len(here), DrawInput)
        draws["logits_row"] = [row.logits.row for row in here]
        draws["masked"] = [NO_TOKEN if row.masked is None else row.masked for row in here]
        draws["inverse_temperature"] = [row.inverse_temperature for row in here]
        draws["uniform"] = uniforms(to_bits([row.seed for row in here]), to_bits([row.position for row in here]))
        drawn = iter(self._steps.draw(draws))
        tokens = [next(drawn) if isinstance(row.logits, _DeviceLogits) else _draw(row) for row in rows]
        return [None if token == NO_TOKEN else token for token in tokens]

    def decode(self, rows: Sequence[DecodeRow], steps: int, next_steps: int = 0) -> list[list[int | None]]:
        """Draws several tokens for each row, without the host between two of them.

        The GPU goes on with the next ones while the caller handles these.
        """
        self._gpu.use()
        begun, self._ahead = self._ahead, None
        places = None if begun is None else begun.batch.find(rows, steps)
        if begun is None or places is None:
            begun, places = self._begin(MultiStepBatch.of(rows, steps)), list(range(len(rows)))
        if next_steps:
            # Rows that have ended are not among the places, and are computed no further.
            self._ahead = self._begin(begun.batch.following(places, next_steps, self._context_length))
        drawn = begun.tokens.wait()[places]  # (R, S)
        tokens: list[list[int | None]] = drawn[:, :steps].tolist()
        left = [self._context_length - row.start for row in rows]
        if drawn.min() == NO_TOKEN or min(left) < steps:
            tokens = [_until_no_token(each[:count]) for each, count in zip(tokens, left, strict=True)]
        return tokens

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first `length` tokens of a slot to other slots, which share its whole pages."""
        for start in range(0, length, SPAN_TOKENS):
            block = self.read(source, start, min(start + SPAN_TOKENS, length))
            for target in targets:
                self.write(target, start, block)

    def read(self, slot: int, start: int, end: int) -> "_Block":
        """Returns the keys and values of a page of a slot: the page itself if it is whole, otherwise a copy."""
        self._gpu.use()
        page = self._slots[slot][start // SPAN_TOKENS]
        assert page is not None and start % SPAN_TOKENS == 0
        if end - start == SPAN_TOKENS:
            page.share()
            return _Block(page, whole=True)
        return _Block(self._pool.copy_of(page), whole=False)

    def write(self, slot: int, start: int, block: "_Block") -> None:
        """Makes a block that `read` returned a page of a slot."""
        self._gpu.use()
        self._set_page(slot, start // SPAN_TOKENS, block.page if block.whole else self._pool.copy_of(block.page))

    def clear(self, slot: int) -> None:
        """Gives up the pages of a slot."""
        self._gpu.use()
        for index in range(len(self._slots[slot])):
            self._set_page(slot, index, None)

    def reset(self) -> None:
        """Discards the content of all slots."""
        self._ahead = None
        for slot in range(len(self._slots)):
            self.clear(slot)

    def _compute(self, spans: Sequence[Span], wanted: NDArray[np.intp]) -> None:
        """Computes spans; the logits after the wanted (K,) of all tokens are then in the first rows of logits."""
        self._gpu.use()
        self._ahead = None
        self._steps.make_room(len(wanted))
        for span in spans:
            self._prepare_pages(span.slot, span.start, span.start + len(span.tokens))
        self._write_table()
        counts = [len(span.tokens) for span in spans]
        rows = np.zeros(sum(counts), Row)
        rows["token"] = [token for span in spans for token in span.tokens]
        rows["slot"] = np.repeat([span.slot for span in spans], counts)
        rows["position"] = [position for span in spans for position in range(span.start, span.start + len(span.tokens))]
        for first in range(0, len(rows), self._steps.most_rows):
            some = rows[first : first + self._steps.most_rows]
            before, until = np.searchsorted(wanted, (first, first + len(some)))
            self._steps.compute(some, wanted[before:until] - first, int(before))

    def _begin(self, batch: MultiStepBatch) -> "_BegunBatch":
        """Gives the slots of a batch pages of their own, and starts to draw its tokens."""
        ends = np.minimum(batch.starts + batch.steps, self._context_length)
        for slot, start, end in zip(batch.slots.tolist(), batch.starts.tolist(), ends.tolist(), strict=True):
            if slot >= 0:
                self._prepare_pages(slot, start, end)
        self._steps.make_room(len(batch.slots))
        self._write_table()
        return _BegunBatch(batch, self._steps.begin_decode(batch))

    def _prepare_pages(self, slot: int, start: int, end: int) -> None:
        """Gives a slot pages of its own for the positions from `start` up to `end`, so that they can be written."""
        for index in range(start // SPAN_TOKENS, -(-end // SPAN_TOKENS)):
            page = self._slots[slot][index]
            if index * SPAN_TOKENS >= start or page is None:
                self._set_page(slot, index, self._pool.take())
            elif page.shared:
                self._set_page(slot, index, self._pool.copy_of(page))

    def _write_table(self) -> None:
        """Copies the addresses of pages to the GPU if they have changed."""
        if self._table_changed:
            self._steps.write_pages()
            self._table_changed = False

    def _set_page(self, slot: int, index: int, page: Page | None) -> None:
        if self._slots[slot][index] is not page:
            self._slots[slot][index] = page
            self._table[slot, index] = 0 if page is None else page.address
            self._table_changed = True


@dataclass(frozen=True)
class _BegunBatch:
    """A batch, and the tokens that the GPU draws for it."""

    batch: MultiStepBatch
    tokens: PendingTokens


@dataclass(frozen=True)
class _DeviceLogits:
    """A row of logits (V,) on the GPU, valid until the decoder computes others."""

    steps: Steps
    row: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Logits:
        """Reads them from the GPU."""
        (logits,) = self.steps.logits(self.row, 1)
        row: Logits = logits
        return row


@dataclass(frozen=True)
class _Block:
    """A page of keys and values; one that is not whole belongs to the block alone."""

    page: Page
    whole: bool


def _until_no_token(tokens: list[int | None]) -> list[int | None]:
    """Returns drawn tokens; None for the first one without finite logits, which ends them."""
    return [*tokens[: tokens.index(NO_TOKEN)], None] if NO_TOKEN in tokens else tokens


def _draw(row: TemperatureSampling) -> int:
    """Draws a token from logits (V,) on the host, which a prompt's log-probabilities needed; -1 if not finite."""
    if not is_finite(row.logits):
        return NO_TOKEN
    logits = row.logits.copy()
    if row.masked is not None:
        logits[row.masked] = -np.inf
    return sample(logits, SamplingParameters(temperature=row.temperature), row.seed, row.position)
