"""The buffers of a decoder on an NVIDIA GPU, and how a step starts the kernels.

Shapes: R rows, K wanted rows, S steps, C width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.decoding.cuda.multi_step_batch import MultiStepBatch
from shared.decoding.cuda.program import (
    FEW_ROWS,
    RANGE_SUM_BYTES,
    Arguments,
    DrawInput,
    Row,
    kernels,
    program,
    range_count,
)
from shared.decoding.cuda.weights import Product, Weights
from shared.decoding.multi_step import MAX_DECODE_STEPS
from shared.decoding.sampling import Logits
from shared.decoding.spans import SPAN_TOKENS
from shared.device.cuda_driver import Event, Gpu
from shared.gpt.model import GPT

# A launch fills its rows, and those that are wanted, up to one of these numbers.
_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_NO_ROW = (0, -1, 0, 0)
_THREADS = 256


@dataclass(frozen=True)
class PendingTokens:
    """The tokens of a batch, which the GPU is drawing."""

    gpu: Gpu
    drawn: NDArray[np.int32]  # (S, R)
    done: Event

    def wait(self) -> NDArray[np.int32]:
        """Waits for the tokens (R, S); -1 if logits are not finite.

        Those of a row after that, or after the end of its context, are undefined. The second `begin_decode` or
        `compute` after that of the batch overwrites the tokens. Raises `CudaError` if a kernel failed.
        """
        self.gpu.wait(self.done)
        return self.drawn.T.copy()


@dataclass(frozen=True)
class _HostMemory:
    """The memory of the host for a batch: its inputs, and what was drawn when `done` has happened."""

    rows: NDArray[Any]  # (R,)
    wanted: NDArray[np.int32]  # (R,)
    places: NDArray[np.int32]  # (R,)
    pages: NDArray[np.uint64]  # (slots, pages)
    draws: NDArray[Any]  # (S * R,)
    drawn: NDArray[np.int32]  # (S * R,)
    done: Event


class Steps:
    """Computes rows, one token each, of slots with keys and values in pages."""

    def __init__(self, model: GPT, gpu: Gpu, pages: NDArray[np.uint64]) -> None:
        """`pages` (slots, pages) are the addresses of the pages. The caller changes them and calls `write_pages`.

        Raises `CudaError` if the GPU has too little memory.
        """
        config = self._config = model.config
        self._gpu = gpu
        self._kernel = gpu.load(*program(config, model.final_norm.eps))
        # The driver may load a kernel when it is first asked for, which must not happen while a graph is recorded.
        for name in kernels():
            self._kernel(name)
        self._weights = Weights(model, gpu)
        self.most_rows = most = _SIZES[-1]
        width, hidden = (-(-size // 32) * 32 for size in (config.width, config.hidden_width))
        self._pages = pages
        self._memory = {
            "pages": gpu.allocate(pages.nbytes),
            "rows": gpu.allocate(most * Row.itemsize),
            "wanted": gpu.allocate(most * 4),
            "places": gpu.allocate(most * 4),
            "token_embedding": self._weights.token_embedding,
            "position_embedding": self._weights.position_embedding,
            "residual": gpu.allocate(most * config.width * 4),
            "normed": gpu.allocate(most * width * 2),
            "queries": gpu.allocate(most * config.width * 4),
            "attended": gpu.allocate(most * width * 2),
            "hidden": gpu.allocate(most * hidden * 2),
        }
        self._graphs: dict[tuple[int, int, int], Any] = {}
        self._logits_bytes = -(-config.vocabulary_size // 16) * 16 * 4
        self._most_logits = 0
        self.make_room(SPAN_TOKENS)

    def make_room(self, logits: int) -> None:
        """Makes room for this many rows of logits; those that were computed are then lost."""
        if logits <= self._most_logits:
            return
        gpu, rows = self._gpu, _padded(logits)
        sizes = {
            "logits": self._logits_bytes,
            "draws": MAX_DECODE_STEPS * DrawInput.itemsize,
            "ranges": range_count(self._config) * RANGE_SUM_BYTES,
            "drawn": MAX_DECODE_STEPS * 4,
            "losses": 4,
        }
        # If there is not enough memory, nothing must use what was freed.
        self._graphs.clear()
        self._most_logits = 0
        for name in sizes:
            if name in self._memory:
                gpu.free(self._memory.pop(name))
        for name, size in sizes.items():
            self._memory[name] = gpu.allocate(rows * size)
        # Double buffering: the host fills one while the GPU uses the other.
        self._host = [self._new_host_memory(rows) for _ in range(2)]
        self._losses = gpu.host_memory(rows * 4).view(np.float32)
        self._most_logits = rows

    def sizes_up_to(self, rows: int) -> list[int]:
        """Returns the numbers of rows of the launches for at most some."""
        return [size for size in _SIZES if size <= _padded(rows)]

    def write_pages(self) -> None:
        """Copies the addresses of pages to the GPU, for all later work."""
        host = self._idle_host_memory()
        host.pages[:] = self._pages
        self._gpu.write(self._memory["pages"], host.pages.reshape(-1).view(np.uint8))

    def compute(self, rows: NDArray[Any], wanted: NDArray[np.intp], logits_row: int) -> None:
        """Starts to compute rows (R,), at most `most_rows`, and writes the logits after the wanted (K,) ones to the
        rows of logits from `logits_row` on.

        Rows of one slot are in the order of their positions.
        """
        R, K = _padded(len(rows)), _padded(len(wanted)) if len(wanted) else 0
        with self._used_host_memory() as host:
            self._upload("rows", host.rows, rows, R, _NO_ROW)
            if K:
                self._upload("wanted", host.wanted, wanted, K, -1)
            if logits_row:
                # A graph holds the address of its logits.
                self._launch_step(R, K, logits_row)
            else:
                self._replay(R, K, 0)

    def begin_decode(self, batch: MultiStepBatch) -> PendingTokens:
        """Starts to draw the tokens of a batch, at most `most_rows` rows, one after the other."""
        count = len(batch.slots)
        R = _padded(count)
        with self._used_host_memory() as host:
            if batch.places is None:
                self._upload("rows", host.rows, batch.rows(), R, _NO_ROW)
                self._upload("wanted", host.wanted, np.arange(count), R, -1)
            else:
                threads = max(R, 32)  # at least a warp
                self._upload("places", host.places, batch.places, threads, -1)
                self._gpu.launch(self._kernel("continue_rows"), (1, 1), threads, Arguments(**self._memory))
            host.draws[: batch.steps * R].reshape(batch.steps, R)[:, :count] = batch.draws()
            self._gpu.write(self._memory["draws"], host.draws[: batch.steps * R].view(np.uint8))
            # Other numbers of steps replay the graph of one: to record a graph for each would take too long.
            at_once = batch.steps if batch.steps == MAX_DECODE_STEPS else 1
            for _ in range(batch.steps // at_once):
                self._replay(R, R, at_once)
            drawn = host.drawn[: batch.steps * R]
            self._gpu.read(self._memory["drawn"], drawn.view(np.uint8))
        return PendingTokens(self._gpu, drawn.reshape(batch.steps, R)[:, :count], host.done)

    def draw(self, draws: NDArray[Any]) -> list[int]:
        """Draws a token for each of the draws; -1 if its logits are not finite."""
        return self._run("draw_tokens", draws, "drawn", self._host[0].drawn)

    def score(self, draws: NDArray[Any]) -> list[float]:
        """Returns the losses in nats of the targets of draws; NaN if the logits are not finite."""
        return self._run("score_tokens", draws, "losses", self._losses)

    def logits(self, first: int, count: int) -> Logits:
        """Returns some rows of logits, (count, V)."""
        rows = np.empty((count, self._logits_bytes // 4), np.float32)
        self._gpu.read(self._memory["logits"] + first * self._logits_bytes, rows.reshape(-1).view(np.uint8))
        self._gpu.wait()
        return rows[:, : self._config.vocabulary_size]

    def _run(self, kernel: str, draws: NDArray[Any], name: str, host: NDArray[Any]) -> list[Any]:
        gpu, results, host_draws = self._gpu, list[Any](), self._idle_host_memory().draws
        # Each draw has sums of its own.
        for first in range(0, len(draws), self._most_logits):
            batch = draws[first : first + self._most_logits]
            host_draws[: len(batch)] = batch
            gpu.write(self._memory["draws"], host_draws[: len(batch)].view(np.uint8))
            self._launch_draws("sum_ranges_of_draws", kernel, len(batch))
            gpu.read(self._memory[name], host[: len(batch)].view(np.uint8))
            gpu.wait()
            results += host[: len(batch)].tolist()
        return results

    def _new_host_memory(self, draws: int) -> _HostMemory:
        def memory(count: int, dtype: Any) -> NDArray[Any]:
            return self._gpu.host_memory(count * np.dtype(dtype).itemsize).view(dtype)

        return _HostMemory(
            rows=memory(self.most_rows, Row),
            wanted=memory(self.most_rows, np.int32),
            places=memory(self.most_rows, np.int32),
            pages=memory(self._pages.size, np.uint64).reshape(self._pages.shape),
            draws=memory(MAX_DECODE_STEPS * draws, DrawInput),
            drawn=memory(MAX_DECODE_STEPS * draws, np.int32),
            done=self._gpu.event(),
        )

    def _idle_host_memory(self) -> _HostMemory:
        """Waits until the GPU does not use the next memory, and returns it."""
        self._gpu.wait(self._host[0].done)
        return self._host[0]

    @contextmanager
    def _used_host_memory(self) -> Iterator[_HostMemory]:
        """Gives the next memory. The work so far uses it afterwards, also if not all of it began, and the other one is
        the next."""
        host = self._idle_host_memory()
        try:
            yield host
        finally:
            self._gpu.mark(host.done)
            self._host.reverse()

    def _upload(self, name: str, host: NDArray[Any], values: NDArray[Any], count: int, filler: object) -> None:
        """Copies values to the GPU through memory of the host, filled up to `count`."""
        host[: len(values)] = values
        host[len(values) : count] = filler
        self._gpu.write(self._memory[name], host[:count].view(np.uint8))

    def _replay(self, R: int, K: int, draws: int) -> None:  # noqa: N803
        """Replays a graph of `_launch_step`: once without draws, else as often as there are draws, each time followed
        by one for every row."""

        def start() -> None:
            for _ in range(max(draws, 1)):
                self._launch_step(R, K, 0)
                if draws:
                    self._launch_draws("sum_ranges_of_rows", "draw_next", R)

        if (R, K, draws) not in self._graphs:
            self._graphs[R, K, draws] = self._gpu.record(start)
        self._gpu.replay(self._graphs[R, K, draws])

    def _launch_step(self, R: int, K: int, logits_row: int) -> None:  # noqa: N803
        """Starts the kernels for R rows, of which K are wanted; each waits for the one before."""
        gpu, arguments = self._gpu, Arguments(**self._memory)
        gpu.launch(self._kernel("embed_rows"), (R, 1), _THREADS, arguments)
        for number, (qkv, *others) in enumerate(self._weights.layers):
            arguments.layer = number
            self._multiply(qkv, R, arguments)
            gpu.launch(self._kernel("attend_rows"), (self._config.heads, R), 32 * self._attention_warps(R), arguments)
            for product in others:
                self._multiply(product, R, arguments)
        if K:
            arguments.logits += logits_row * self._logits_bytes
            self._weights.head.enter_addresses(arguments)
            gpu.launch(self._kernel("normalise_wanted"), (K, 1), 32, arguments)
            self._multiply(self._weights.head, K, arguments)

    def _multiply(self, product: Product, rows: int, arguments: Arguments) -> None:
        blocks = product.blocks(rows, self._gpu.multiprocessors)
        product.enter_addresses(arguments)
        kernel, grid = self._kernel(blocks.kernel), blocks.grid(rows, product.outputs)
        self._gpu.launch(kernel, grid, 32 * blocks.warps, arguments)

    def _attention_warps(self, rows: int) -> int:
        """Returns the number of warps that share the pages of a row in a head: more if there are few rows."""
        pages = -(-self._config.context_length // SPAN_TOKENS)
        return 4 if rows > FEW_ROWS else min(max(pages, 4), 16)

    def _launch_draws(self, sums: str, kernel: str, count: int) -> None:
        arguments = Arguments(**self._memory)
        self._gpu.launch(self._kernel(sums), (-(-range_count(self._config) // 8), count), _THREADS, arguments)
        self._gpu.launch(self._kernel(kernel), (1, count), 32, arguments)


def _padded(rows: int) -> int:
    """Returns the number of rows of a launch for some; beyond the most rows of a launch, for several launches."""
    return next((size for size in _SIZES if size >= rows), -(-rows // _SIZES[-1]) * _SIZES[-1])
