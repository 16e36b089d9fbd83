"""The program of the kernels: for which models it is compiled, and what the host and the kernels have in common.

Shapes: N outputs, C inputs.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared.decoding.spans import SPAN_TOKENS
from shared.gpt.config import GPTConfig

# As in `rows.cuh`.
Row = np.dtype([("token", np.int32), ("slot", np.int32), ("position", np.int32), ("step", np.int32)])
DrawInput = np.dtype(
    [
        *((name, np.int32) for name in ("logits_row", "masked", "target")),
        *((name, np.float32) for name in ("inverse_temperature", "uniform")),
    ]
)
# A sum of a range of the vocabulary, as in `rows.cuh`.
RANGE_SUM_BYTES = 8

# The rows that a block of each product may have. The warps of a narrow block share 16 outputs and divide the inputs;
# each warp of a wide block has 16 outputs and all inputs, and each warp of a staged block 32 outputs and all inputs.
_ROWS = dict.fromkeys(("qkv", "attention_output", "up", "down"), (16, 8))
_WIDE_ROWS = {"qkv": (16, 8), "up": (16, 8), "head": (32, 16, 8)}
_STAGED_ROWS = {"head": (64,)}
_WIDE_WARPS = 8
# Up to this many rows, more warps share the pages of a row, and keys and values are prefetched.
FEW_ROWS = 16
# What the threads of a block may share.
SHARED_BYTES = 48 << 10


@dataclass(frozen=True)
class Blocks:
    """The blocks of a kernel that multiplies: the rows, outputs and warps of each."""

    kernel: str
    rows: int
    outputs: int
    warps: int

    def grid(self, rows: int, outputs: int) -> tuple[int, int]:
        """Returns the numbers of blocks for all rows and outputs of a product."""
        return -(-rows // self.rows), -(-outputs // self.outputs)


def blocks_of(product: str, inputs: int) -> list[Blocks]:
    """Returns the blocks that a product may have, the largest first."""
    warps = warps_for(inputs)
    return [Blocks(f"{product}_{rows}", rows, 16, warps) for rows in _ROWS.get(product, ())]


def wide_blocks_of(product: str) -> list[Blocks]:
    """Returns the wide and staged blocks that a product may have, the largest first."""
    kinds = ((32, "staged", _STAGED_ROWS), (16, "wide", _WIDE_ROWS))
    return [
        Blocks(f"{product}_{kind}_{rows}", rows, outputs * _WIDE_WARPS, _WIDE_WARPS)
        for outputs, kind, sizes in kinds
        for rows in sizes.get(product, ())
    ]


# A block holds the inputs of eight rows, and the sums of all pages of a row, in shared memory. Wider products compile
# slowly. With one token masked, another must be left.
_SUPPORTED = {
    "width": (1, 3072),
    "hidden_width": (1, 1 << 15),
    "head_width": (1, 128),
    "context_length": (1, 4096),
    "vocabulary_size": (2, 1 << 20),
}
_SOURCES = ("primitives.cuh", "rows.cuh", "products.cu", "attention.cu", "draws.cu")
_ADDRESSES = (
    *("rows", "wanted", "places", "pages", "token_embedding", "position_embedding", "norm_weight", "norm_bias"),
    *("weight", "bias", "residual", "normed", "queries", "attended", "hidden", "logits"),
    *("draws", "ranges", "drawn", "losses"),
)


class Arguments(ctypes.Structure):
    """The argument of each kernel, as in `rows.cuh`."""

    _fields_ = [*((name, ctypes.c_uint64) for name in _ADDRESSES), ("layer", ctypes.c_int)]


def kernels() -> list[str]:
    """Returns the names of all kernels."""
    return [
        *("embed_rows", "normalise_wanted", "attend_rows", "sum_ranges_of_draws", "sum_ranges_of_rows"),
        *("draw_tokens", "draw_next", "score_tokens", "continue_rows"),
        *(f"{product}_{rows}" for product, sizes in _ROWS.items() for rows in sizes),
        *(f"{product}_wide_{rows}" for product, sizes in _WIDE_ROWS.items() for rows in sizes),
        *(f"{product}_staged_{rows}" for product, sizes in _STAGED_ROWS.items() for rows in sizes),
    ]


def supports(config: GPTConfig) -> bool:
    """Whether the kernels take models of this shape."""
    return all(least <= getattr(config, name) <= most for name, (least, most) in _SUPPORTED.items())


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
        "WIDTH_WARPS": str(warps_for(config.width)),
        "HIDDEN_WARPS": str(warps_for(config.hidden_width)),
        "WIDE_WARPS": str(_WIDE_WARPS),
        "SHARED_BYTES": str(SHARED_BYTES),
        "FEW_ROWS": str(FEW_ROWS),
        "RANGE": str(_range_size(config)),
        "RANGES": str(range_count(config)),
    }


def range_count(config: GPTConfig) -> int:
    """Returns the number of ranges of the vocabulary whose logits are summed alone, at most 1,024."""
    return -(-config.vocabulary_size // _range_size(config))


def warps_for(inputs: int) -> int:
    """Returns the number of warps among which a product divides its groups of 32 inputs."""
    groups = -(-inputs // 32)
    return max((warps for warps in range(4, 13) if groups % warps == 0), default=8)


def _range_size(config: GPTConfig) -> int:
    return max(256, -(-config.vocabulary_size // 1024 // 128) * 128)
