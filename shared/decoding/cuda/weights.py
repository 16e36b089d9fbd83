"""The weights of a model on an NVIDIA GPU, packed for its kernels.

Shapes: N outputs, C inputs.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from shared.decoding.cuda.program import SHARED_BYTES, Arguments, Blocks, blocks_of, wide_blocks_of
from shared.device.cuda_driver import Gpu
from shared.gpt.model import GPT

# From this many rows on, a LayerNorm is shared among many outputs.
_MANY_ROWS = 64


@dataclass(frozen=True)
class Product:
    """A product with a weight (N, C); the addresses are those of its weight, its bias and the LayerNorm of its inputs,
    if it has one. A block may compute that LayerNorm."""

    kernel: str
    inputs: int
    outputs: int
    addresses: dict[str, int]

    @property
    def normalises(self) -> bool:
        """Whether its blocks compute the LayerNorm of their rows; that of the head is a kernel of its own."""
        return "norm_weight" in self.addresses and self.kernel != "head"

    def blocks(self, rows: int, multiprocessors: int) -> Blocks:
        """Returns the largest blocks of which there are more than the GPU has multiprocessors, or else the smallest."""
        sizes = self.sizes(rows, wide=rows >= _MANY_ROWS)
        return next((each for each in sizes if prod(each.grid(rows, self.outputs)) > multiprocessors), sizes[-1])

    def sizes(self, rows: int, *, wide: bool) -> list[Blocks]:
        """Returns the blocks that can compute some rows, the largest first: wide ones if asked for, or if there are no
        others, as far as the product has them."""
        narrow, wider = blocks_of(self.kernel, self.inputs), wide_blocks_of(self.kernel)
        sizes = wider if wider and (wide or not narrow) else narrow
        return [each for each in sizes if each.rows <= rows and self._fits(each)]

    def _fits(self, blocks: Blocks) -> bool:
        """Whether a block can hold its rows, if it normalises them."""
        row_bytes = -(-self.inputs // 32) * 32 * 2
        return not self.normalises or blocks.rows * row_bytes <= SHARED_BYTES

    def enter_addresses(self, arguments: Arguments) -> None:
        """Writes them to the arguments of a kernel."""
        for name, address in self.addresses.items():
            setattr(arguments, name, address)


class Weights:
    """The products and embeddings of a model in bf16, with biases and norms in fp32."""

    def __init__(self, model: GPT, gpu: Gpu) -> None:
        """Raises `CudaError` if the GPU has too little memory."""
        self._gpu = gpu
        # Of each layer, in the order of their use.
        self.layers = [
            (
                self._product("qkv", block.attention.qkv.weight, block.attention.qkv.bias, block.attention_norm),
                self._product("attention_output", block.attention.output.weight, block.attention.output.bias),
                self._product("up", block.feed_forward.up.weight, block.feed_forward.up.bias, block.feed_forward_norm),
                self._product("down", block.feed_forward.down.weight, block.feed_forward.down.bias),
            )
            for block in model.blocks
        ]
        self.head = self._product("head", model.head_weight, None, model.final_norm)
        self.token_embedding = self._upload(_bf16_bits(model.token_embedding.weight))
        self.position_embedding = self._upload(_bf16_bits(model.position_embedding.weight))

    def _product(self, kernel: str, weight: mx.array, bias: mx.array | None, norm: Any = None) -> Product:
        outputs, inputs = weight.shape
        addresses = {"weight": self._upload(packed(weight)), "bias": 0 if bias is None else self._upload(_fp32(bias))}
        if norm is not None:
            addresses |= {
                "norm_weight": self._upload(_fp32(norm.weight)),
                "norm_bias": self._upload(_fp32(norm.bias)),
            }
        return Product(kernel, inputs, outputs, addresses)

    def _upload(self, array: NDArray[Any]) -> int:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        address = self._gpu.allocate(data.nbytes)
        self._gpu.write(address, data)
        self._gpu.wait()
        return address


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


def _bf16_bits(array: mx.array) -> NDArray[np.uint16]:
    """Returns the bits of numbers as bf16."""
    return np.asarray(array.astype(mx.bfloat16).view(mx.uint16))


def _fp32(array: mx.array) -> NDArray[np.float32]:
    return np.asarray(array.astype(mx.float32))
