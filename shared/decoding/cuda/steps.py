"""The weights and buffers of a model on an NVIDIA GPU, and how a step starts the kernels.

Shapes: R rows, K wanted rows, N outputs, C inputs, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.decoding.multi_step import MAX_DECODE_STEPS
from shared.decoding.sampling import Logits
from shared.decoding.spans import SPAN_TOKENS
from shared.device.cuda_driver import Gpu
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT

# As in `rows.cuh`.
Row = np.dtype([("token", np.int32), ("slot", np.int32), ("position", np.int32), ("step", np.int32)])
DrawInput = np.dtype(
    [
        *((name, np.int32) for name in ("logits_row", "masked", "target")),
        *((name, np.float32) for name in ("inverse_temperature", "uniform")),
    ]
)
NO_TOKEN = -1

# A launch fills its rows, and those that are wanted, up to one of these numbers.
_SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_NO_ROW = (0, -1, 0, 0)
# Up to so many rows, more warps share the pages of a row.
_FEW_ROWS = 16
# The rows that a block of a product, and one of the head, may have; with a LayerNorm, it computes fewer.
_TILES = (8, 16, 32)
_HEAD_TILES = (8, 16, 32, 64)
_NORMED_TILE = 16
# From so many rows on, a kernel of its own computes a LayerNorm.
_MANY_ROWS = 128
# What the threads of a block may share.
_SHARED_BYTES = 48 << 10
_THREADS = 256

# A block holds the inputs of eight rows, and the sums of all pages of a row, in shared memory. Wider products compile
# slowly. With one token masked, another must be left.
_RANGES = {
    "width": (1, 3072),
    "hidden_width": (1, 1 << 15),
    "head_width": (1, 128),
    "context_length": (1, 4096),
    "vocabulary_size": (2, 1 << 20),
}
_SOURCES = ("primitives.cuh", "rows.cuh", "products.cu", "attention.cu", "draws.cu")
_KERNELS = (
    *("embed_rows", "normalise_rows", "normalise_wanted", "attend_rows", "sum_ranges_of_draws", "sum_ranges_of_rows"),
    *("draw_tokens", "draw_next", "score_tokens"),
    *(f"{name}_{tile}" for name in ("qkv", "attention_output", "up", "down") for tile in _TILES),
    *("qkv_wide_32", "up_wide_32"),
    *(f"head_wide_{tile}" for tile in _HEAD_TILES),
)


def supports(config: GPTConfig) -> bool:
    """Whether the kernels take models of this shape."""
    return all(least <= getattr(config, name) <= most for name, (least, most) in _RANGES.items())


class _Arguments(ctypes.Structure):
    """The argument of each kernel, as in `rows.cuh`."""

    _fields_ = [
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("rows", "wanted", "pages", "token_embedding", "position_embedding", "norm_weight", "norm_bias"),
                *(
                    "weight",
                    "bias",
                    "residual",
                    "normed",
                    "queries",
                    "attended",
                    "hidden",
                    "logits",
                    "draws",
                    "ranges",
                    "drawn",
                    "losses",
                ),
            )
        ),
        ("layer", ctypes.c_int),
    ]


@dataclass(frozen=True)
class _Product:
    """A product with a weight (N, C); the addresses are those of its weight, its bias and the LayerNorm of its inputs,
    if it has one."""

    kernel: str
    inputs: int
    outputs: int
    addresses: dict[str, int]

    @property
    def normed(self) -> bool:
        """Whether its inputs are a LayerNorm."""
        return "norm_weight" in self.addresses

    def fits(self, rows: int) -> bool:
        """Whether a block can hold the inputs of so many rows, if it computes them."""
        return not self.normed or (rows <= _NORMED_TILE and rows * -(-self.inputs // 32) * 64 <= _SHARED_BYTES)

    def enter_addresses(self, arguments: _Arguments) -> None:
        """Writes them to the arguments of a kernel."""
        for name, address in self.addresses.items():
            setattr(arguments, name, address)


class Steps:
    """Computes rows, one token each, of slots whose pages are in a table (slots, pages) at the address `pages`."""

    def __init__(self, model: GPT, gpu: Gpu, pages: int) -> None:
        """Raises `CudaError` if the GPU has too little memory."""
        config = self._config = model.config
        self._gpu = gpu
        self._kernel = gpu.load(*program(config, model.final_norm.eps))
        # The driver may load a kernel when it is first asked for, which must not happen while a graph is recorded.
        for name in _KERNELS:
            self._kernel(name)
        self._layers = [
            (
                self._product("qkv", block.attention.qkv.weight, block.attention.qkv.bias, block.attention_norm),
                self._product("attention_output", block.attention.output.weight, block.attention.output.bias),
                self._product("up", block.feed_forward.up.weight, block.feed_forward.up.bias, block.feed_forward_norm),
                self._product("down", block.feed_forward.down.weight, block.feed_forward.down.bias),
            )
            for block in model.blocks
        ]
        self._head = self._product("head", model.head_weight, None, model.final_norm)
        self.most_rows = most = _SIZES[-1]
        width, hidden = (-(-size // 32) * 32 for size in (config.width, config.hidden_width))
        self._memory = {
            "pages": pages,
            "rows": gpu.allocate(most * Row.itemsize),
            "wanted": gpu.allocate(most * 4),
            "token_embedding": self._upload(_bf16_bits(model.token_embedding.weight)),
            "position_embedding": self._upload(_bf16_bits(model.position_embedding.weight)),
            "residual": gpu.allocate(most * config.width * 4),
            "normed": gpu.allocate(most * width * 2),
            "queries": gpu.allocate(most * config.width * 4),
            "attended": gpu.allocate(most * width * 2),
            "hidden": gpu.allocate(most * hidden * 2),
        }
        self._rows = gpu.host_memory(most * Row.itemsize).view(Row)
        self._wanted = gpu.host_memory(most * 4).view(np.int32)
        self._graphs: dict[tuple[int, int, bool], Any] = {}
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
            "ranges": _range_count(self._config) * 8,
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
        self._draws = gpu.host_memory(MAX_DECODE_STEPS * rows * DrawInput.itemsize).view(DrawInput)
        self._drawn = gpu.host_memory(MAX_DECODE_STEPS * rows * 4).view(np.int32)
        self._losses = gpu.host_memory(rows * 4).view(np.float32)
        self._most_logits = rows

    def sizes_up_to(self, rows: int) -> list[int]:
        """Returns the numbers of rows of the launches for at most some."""
        return [size for size in _SIZES if size <= _padded(rows)]

    def compute(self, rows: Sequence[tuple[int, int, int, int]], wanted: NDArray[np.intp], logits_row: int) -> None:
        """Starts to compute at most `most_rows` rows, and writes the logits after the wanted (K,) ones to the rows of
        logits from `logits_row` on.

        `rows` are as in `Row`; those of one slot are in the order of their positions. The GPU must have ended its work.
        """
        R, K = self._write_rows(rows, wanted)
        if logits_row:
            # A graph holds the address of its logits.
            self._launch_step(R, K, logits_row)
        else:
            self._replay(R, K, draws=False)

    def begin_decode(self, rows: NDArray[Any], draws: NDArray[Any]) -> None:
        """Starts to draw tokens for at most `most_rows` rows, one after the other. The GPU must have ended its work.

        `rows` (R,) are as in `Row`, `draws` (S, R) as in `DrawInput`.
        """
        steps, count = draws.shape
        R, _ = self._write_rows(rows, np.arange(count))
        self._draws[: steps * R].reshape(steps, R)[:, :count] = draws
        self._gpu.write(self._memory["draws"], self._draws[: steps * R].view(np.uint8))
        for _ in range(steps):
            self._replay(R, R, draws=True)
        self._gpu.read(self._memory["drawn"], self._drawn[: steps * R].view(np.uint8))

    def drawn(self, steps: int, count: int) -> NDArray[np.int32]:
        """Returns the tokens (R, S) that were drawn since `begin_decode`; -1 if logits are not finite.

        What is returned for a row whose context is full is undefined.
        """
        self._gpu.wait()
        R = _padded(count)
        return self._drawn[: steps * R].reshape(steps, R)[:, :count].T.copy()

    def draw(self, draws: Sequence[tuple[int, int, int, float, float]]) -> list[int]:
        """Draws a token for each of the draws, which are as in `DrawInput`; -1 if its logits are not finite."""
        return self._run("draw_tokens", draws, "drawn", self._drawn)

    def score(self, targets: Sequence[int]) -> list[float]:
        """Returns the losses in nats of targets, one for each row of logits; NaN if they are not finite."""
        scores = [(row, NO_TOKEN, token, 1.0, 0.0) for row, token in enumerate(targets)]
        return self._run("score_tokens", scores, "losses", self._losses)

    def logits(self, first: int, count: int) -> Logits:
        """Returns some rows of logits, (count, V)."""
        rows = np.empty((count, self._logits_bytes // 4), np.float32)
        self._gpu.read(self._memory["logits"] + first * self._logits_bytes, rows.reshape(-1).view(np.uint8))
        self._gpu.wait()
        return rows[:, : self._config.vocabulary_size]

    def _run(
        self, kernel: str, draws: Sequence[tuple[int, int, int, float, float]], name: str, host: NDArray[Any]
    ) -> list[Any]:
        gpu, results = self._gpu, list[Any]()
        for first in range(0, len(draws), len(self._draws)):
            batch = draws[first : first + len(self._draws)]
            self._draws[: len(batch)] = batch
            gpu.write(self._memory["draws"], self._draws[: len(batch)].view(np.uint8))
            self._launch_draws("sum_ranges_of_draws", kernel, len(batch))
            gpu.read(self._memory[name], host[: len(batch)].view(np.uint8))
            gpu.wait()
            results += host[: len(batch)].tolist()
        return results

    def _write_rows(
        self, rows: Sequence[tuple[int, int, int, int]] | NDArray[Any], wanted: NDArray[np.intp]
    ) -> tuple[int, int]:
        """Copies the rows and the wanted ones to the GPU; returns the numbers of them that a launch computes."""
        R, K = _padded(len(rows)), _padded(len(wanted)) if len(wanted) else 0
        self._rows[: len(rows)] = rows
        self._rows[len(rows) : R] = _NO_ROW
        self._wanted[: len(wanted)] = wanted
        self._wanted[len(wanted) : K] = -1
        self._gpu.write(self._memory["rows"], self._rows[:R].view(np.uint8))
        if K:
            self._gpu.write(self._memory["wanted"], self._wanted[:K].view(np.uint8))
        return R, K

    def _replay(self, R: int, K: int, *, draws: bool) -> None:  # noqa: N803
        """Does the work of `_launch_step` by a graph, and draws the next token of each row if asked to."""

        def start() -> None:
            self._launch_step(R, K, 0)
            if draws:
                self._launch_draws("sum_ranges_of_rows", "draw_next", R)

        if (R, K, draws) not in self._graphs:
            self._graphs[R, K, draws] = self._gpu.record(start)
        self._gpu.replay(self._graphs[R, K, draws])

    def _launch_step(self, R: int, K: int, logits_row: int) -> None:  # noqa: N803
        """Starts the kernels for R rows, of which K are wanted, each of them when the one before has ended."""
        gpu, arguments = self._gpu, _Arguments(**self._memory)
        gpu.launch(self._kernel("embed_rows"), (R, 1), _THREADS, arguments)
        for number, (qkv, *others) in enumerate(self._layers):
            arguments.layer = number
            self._multiply(qkv, R, arguments)
            gpu.launch(self._kernel("attend_rows"), (self._config.heads, R), 32 * self._attention_warps(R), arguments)
            for product in others:
                self._multiply(product, R, arguments)
        if K:
            arguments.logits += logits_row * self._logits_bytes
            self._multiply_wide(self._head, K, min(K, _HEAD_TILES[-1]), "normalise_wanted", arguments)

    def _multiply_wide(self, product: _Product, rows: int, tile: int, normalise: str, arguments: _Arguments) -> None:
        """Starts a LayerNorm, and a product in which each warp has outputs of its own."""
        product.enter_addresses(arguments)
        self._gpu.launch(self._kernel(normalise), (rows, 1), 32, arguments)
        grid = (rows // tile, -(-product.outputs // 64))
        self._gpu.launch(self._kernel(f"{product.kernel}_wide_{tile}"), grid, 128, arguments)

    def _multiply(self, product: _Product, rows: int, arguments: _Arguments) -> None:
        """Starts a product with as many rows in a block as leave enough blocks for the GPU, and fit."""
        if product.normed and rows >= _MANY_ROWS:
            self._multiply_wide(product, rows, 32, "normalise_rows", arguments)
            return
        product.enter_addresses(arguments)
        blocks = -(-product.outputs // 16)
        least = self._gpu.multiprocessors // blocks
        tile = max((tile for tile in _TILES if rows // tile > least and product.fits(tile)), default=8)
        grid, threads = (blocks, rows // tile), 32 * _warps_for(product.inputs)
        self._gpu.launch(self._kernel(f"{product.kernel}_{tile}"), grid, threads, arguments)

    def _attention_warps(self, rows: int) -> int:
        """Returns the number of warps that share the pages of a row in a head: more if there are few rows."""
        pages = -(-self._config.context_length // SPAN_TOKENS)
        return 4 if rows > _FEW_ROWS else min(max(pages, 4), 16)

    def _launch_draws(self, sums: str, kernel: str, count: int) -> None:
        arguments = _Arguments(**self._memory)
        self._gpu.launch(self._kernel(sums), (-(-_range_count(self._config) // 8), count), _THREADS, arguments)
        self._gpu.launch(self._kernel(kernel), (1, count), 32, arguments)

    def _product(self, kernel: str, weight: mx.array, bias: mx.array | None, norm: Any = None) -> _Product:
        outputs, inputs = weight.shape
        addresses = {"weight": self._upload(packed(weight)), "bias": 0 if bias is None else self._upload(_fp32(bias))}
        if norm is not None:
            addresses |= {
                "norm_weight": self._upload(_fp32(norm.weight)),
                "norm_bias": self._upload(_fp32(norm.bias)),
            }
        return _Product(kernel, inputs, outputs, addresses)

    def _upload(self, array: NDArray[Any]) -> int:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self._gpu.allocate(data.nbytes)
        self._gpu.write(address, data)
        self._gpu.wait()
        return address


def program(config: GPTConfig, epsilon: float) -> tuple[str, dict[str, str]]:
    """Returns the source of the kernels, and the constants of a shape with which it is compiled."""
    source = "".join(Path(__file__).with_name(name).read_text() for name in _SOURCES)
    return source, {
        "WIDTH": str(config.width),
        "HEADS": str(config.heads),
        "HIDDEN": str(config.hidden_width),
        "VOCABULARY": str(config.vocabulary_size),
        "POSITIONS": str(config.context_length),
        "EPSILON": f"{epsilon!r}f",
        "PAGE": str(SPAN_TOKENS),
        "WIDTH_WARPS": str(_warps_for(config.width)),
        "HIDDEN_WARPS": str(_warps_for(config.hidden_width)),
        "SHARED_BYTES": str(_SHARED_BYTES),
        "FEW_ROWS": str(_FEW_ROWS),
        "RANGE": str(_range_size(config)),
        "RANGES": str(_range_count(config)),
    }


def packed(weight: mx.array) -> NDArray[np.uint16]:
    """Packs a weight (N, C) in the order in which `multiply` loads it.

    For 16 outputs and 32 inputs come the 8 numbers of each of 32 lanes for a product with 16 of the inputs, and then
    those for the others.
    """
    N, C = weight.shape
    padded = np.pad(_bf16_bits(weight), ((0, -N % 16), (0, -C % 32)))
    # outputs: tile, half of 8, row; inputs: group of 32, quarter, product, half, one of two
    parts = padded.reshape(len(padded) // 16, 2, 8, -1, 4, 2, 2, 2)
    return np.ascontiguousarray(parts.transpose(0, 3, 5, 2, 4, 6, 1, 7))


def _range_size(config: GPTConfig) -> int:
    """Returns the number of tokens in a range of the vocabulary, of which there are at most 1,024."""
    return max(256, -(-config.vocabulary_size // 1024 // 128) * 128)


def _range_count(config: GPTConfig) -> int:
    return -(-config.vocabulary_size // _range_size(config))


def _warps_for(inputs: int) -> int:
    """Returns the number of warps among which a product divides its groups of 32 inputs."""
    groups = -(-inputs // 32)
    return max((warps for warps in range(4, 13) if groups % warps == 0), default=8)


def _bf16_bits(array: mx.array) -> NDArray[np.uint16]:
    """Returns the bits of numbers as bf16."""
    return np.asarray(array.astype(mx.bfloat16).view(mx.uint16))


def _fp32(array: mx.array) -> NDArray[np.float32]:
    return np.asarray(array.astype(mx.float32))


def _padded(rows: int) -> int:
    """Returns the number of rows of a launch for some; beyond the most rows of a launch, for several launches."""
    return next((size for size in _SIZES if size >= rows), -(-rows // _SIZES[-1]) * _SIZES[-1])
