"""Computes prompts and decodes on an NVIDIA GPU.

MLX builds its graph anew at each step, which takes ten times as long as such a GPU needs for a step of a small model.
Here a step is a CUDA graph, made once for each of a few numbers of rows.
Shapes: T tokens, K wanted tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.decoding.cuda.pages import Page, PagePool
from shared.decoding.cuda.steps import NO_TOKEN, Steps, supports
from shared.decoding.sampling import Logits, SamplingParameters, TemperatureSampling, is_finite, sample, uniform
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.device.cuda_driver import Gpu
from shared.gpt.model import GPT


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
        self._slots: list[list[Page | None]] = [[None] * pages for _ in range(slots)]
        # The addresses of their pages, as the host and as the GPU know them.
        self._table = gpu.host_memory(slots * pages * 8).view(np.uint64).reshape(slots, pages)
        self._table_address = gpu.allocate(self._table.nbytes)
        self._table_changed = True
        self._steps = Steps(model, gpu, self._table_address)
        groups = -(-config.head_width // 8)
        self._pool = PagePool(gpu, config.layers * 2 * config.heads * groups * 8 * SPAN_TOKENS * 2)
        gpu.wait()

    @property
    def memory_bytes(self) -> int:
        """The memory of the weights, of the buffers and of all pages that were ever in use."""
        return self._steps.memory_bytes + self._table.nbytes + self._pool.memory_bytes

    @property
    def bytes_per_token(self) -> int:
        """The memory that each token takes in a slot."""
        return self._pool.page_bytes // SPAN_TOKENS

    def warm_up(self) -> Iterator[None]:
        """Makes the graph of few rows."""
        (row,) = self.forward([Span(0, 0, (0,))])
        self.draw([TemperatureSampling(row, 1.0, seed=0, position=0, masked=None)])
        yield
        self.reset()

    def forward(self, spans: Sequence[Span]) -> Sequence["_Row"]:
        """Computes spans and returns the logits (V,) after each, on the GPU until `np.asarray` reads them."""
        self._compute(spans, np.cumsum([len(span.tokens) for span in spans]) - 1)
        return [_Row(self._steps, place) for place in range(len(spans))]

    def logits(self, span: Span) -> tuple[Logits, Logits]:
        """Returns the logits (T, V) after each token of a span, and those after the last one."""
        count = len(span.tokens)
        self._compute([span], np.arange(count))
        rows = self._steps.logits(0, count)
        return rows, rows[-1]

    def score(self, span: Span, targets: Sequence[int]) -> list[float]:
        """Returns the loss in nats of the token after each token of a span."""
        self._compute([span], np.arange(len(span.tokens)))
        return self._steps.score(targets)

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        """Draws a token for each row; None if its logits are not finite."""
        self._gpu.use()
        here = [isinstance(row.logits, _Row) for row in rows]
        tokens = iter(
            self._steps.draw(
                [
                    (
                        row.logits.place,
                        NO_TOKEN if row.masked is None else row.masked,
                        row.inverse_temperature,
                        uniform(row.seed, row.position),
                    )
                    for row, on_gpu in zip(rows, here, strict=True)
                    if on_gpu
                ]
            )
        )
        drawn = [next(tokens) if on_gpu else _draw(row) for row, on_gpu in zip(rows, here, strict=True)]
        return [None if token == NO_TOKEN else token for token in drawn]

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
            page.shared = True
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
        for slot in range(len(self._slots)):
            self.clear(slot)

    def _compute(self, spans: Sequence[Span], wanted: NDArray[np.intp]) -> None:
        """Computes spans; the logits after the wanted (K,) of all tokens are then in their places."""
        self._gpu.use()
        # The GPU may still copy what the last call wrote for it.
        self._gpu.wait()
        self._steps.make_room(len(wanted))
        for span in spans:
            self._prepare_pages(span)
        if self._table_changed:
            self._gpu.write(self._table_address, self._table.reshape(-1).view(np.uint8))
            self._table_changed = False
        rows = [
            (token, span.slot, position, 0) for span in spans for position, token in enumerate(span.tokens, span.start)
        ]
        for first in range(0, len(rows), self._steps.most_rows):
            some = rows[first : first + self._steps.most_rows]
            before, until = np.searchsorted(wanted, (first, first + len(some)))
            if first:
                self._gpu.wait()
            self._steps.compute(some, wanted[before:until] - first, int(before))

    def _prepare_pages(self, span: Span) -> None:
        """Gives a slot a page of its own for each position that a span writes."""
        end = span.start + len(span.tokens)
        for index in range(span.start // SPAN_TOKENS, -(-end // SPAN_TOKENS)):
            page = self._slots[span.slot][index]
            if index * SPAN_TOKENS >= span.start or page is None:
                self._set_page(span.slot, index, self._pool.take())
            elif page.shared:
                self._set_page(span.slot, index, self._pool.copy_of(page))

    def _set_page(self, slot: int, index: int, page: Page | None) -> None:
        if self._slots[slot][index] is page:
            return
        if not self._table_changed:
            # The GPU may still copy the table.
            self._gpu.wait()
            self._table_changed = True
        self._slots[slot][index] = page
        self._table[slot, index] = 0 if page is None else page.address


@dataclass(frozen=True)
class _Row:
    """The logits (V,) in a place, valid until the decoder computes others."""

    steps: Steps
    place: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Logits:
        """Reads them from the GPU."""
        (logits,) = self.steps.logits(self.place, 1)
        row: Logits = logits
        return row


@dataclass(frozen=True)
class _Block:
    """A page of keys and values; one that is not whole belongs to the block alone."""

    page: Page
    whole: bool


def _draw(row: TemperatureSampling) -> int:
    """Draws a token from logits (V,) on the host, which a prompt's log-probabilities needed; -1 if not finite."""
    if not is_finite(row.logits):
        return NO_TOKEN
    logits = row.logits.copy()
    if row.masked is not None:
        logits[row.masked] = -np.inf
    return sample(logits, SamplingParameters(temperature=row.temperature), row.seed, row.position)
