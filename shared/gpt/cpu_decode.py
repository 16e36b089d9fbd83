"""One decode step on a CPU, in NumPy on the model's and the cache's own memory.

A step is many small operations, and hands each weight once to few rows. MLX's CPU backend spends more time between such
operations than in them, and its products copy a whole weight into another order first.
What a row gets depends on nothing beside it: it attends on its own, exactly as far as it was read, and all else acts on
single rows except the products, whose rows come out alike.
Shapes: R rows, T tokens, S positions of the context, H heads, D head width, C width, N outputs, V vocabulary.
"""

import math
from functools import cache
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from shared.gpt.cache import KVCache
    from shared.gpt.model import GPT, Block

Array = NDArray[np.float32]

# With AVX-512, OpenBLAS multiplies without copying what gives at most 1200 numbers from at most a million products, and
# there gives a row of two or more the same bits in any number (its file sgemm_small_kernel_permit_skylakex.c).
_MOST_ROWS, _MOST_OUTPUTS, _MOST_PRODUCTS = 32, 32, 1_000_000
# Without, a row's bits hang on its place among 4 or 12, but not among exactly so many.
_ROWS_ALIKE = 8


def decode(model: "GPT", tokens: NDArray[np.int32], cache: "KVCache", positions: NDArray[np.int32]) -> Array:
    """One token (R,) at its position (R,) for each of the first R slots of the cache; logits (R, V)."""
    x: Array = view(model.token_embedding.weight)[tokens] + view(model.position_embedding.weight)[positions]  # (R, C)
    # Numbers that are not finite are the caller's to find, in the logits.
    with np.errstate(all="ignore"):
        for block, layer in zip(model.blocks, cache.layers, strict=True):
            _add_block(x, block, view(layer.keys), view(layer.values), positions)
        return product(_norm(x, model.final_norm), view(model.head_weight))


def view(array: mx.array) -> Any:
    """An evaluated array's own memory. The array must not be in use elsewhere while the view is written to."""
    return np.asarray(array)


def product(x: Array, weight: Array) -> Array:
    """x @ weight.T of (R, C) and (N, C): (R, N), in blocks of outputs so small that OpenBLAS reads the weight in place.

    A row's bits depend neither on how many rows there are, from two on, nor on which of them it is.
    """
    R, C = x.shape
    N = weight.shape[0]
    if _alike_in_any_number():
        # Halves, thirds and so on rather than a short rest, for a product of one row has other bits.
        parts = -(-R // _MOST_ROWS)
        rows = [slice(R * part // parts, R * (part + 1) // parts) for part in range(parts)]
    else:
        x = np.concatenate([x, np.zeros((-R % _ROWS_ALIKE, C), np.float32)])
        rows = [slice(start, start + _ROWS_ALIKE) for start in range(0, len(x), _ROWS_ALIKE)]
    most = max(1, _MOST_PRODUCTS // (_MOST_ROWS * C))
    size = min(_MOST_OUTPUTS, 1 << int(math.log2(most)))
    whole = N // size * size
    blocks = weight[:whole].reshape(-1, size, C).swapaxes(1, 2)  # (N/size, C, size)
    result = np.empty((len(x), N), np.float32)
    by_block = result[:, :whole].reshape(len(x), -1, size).swapaxes(0, 1)  # (N/size, R, size)
    for some in rows:
        np.matmul(x[some], blocks, out=by_block[:, some])
    if whole < N:
        # A block like the others, for a product of one column has other bits.
        last = slice(max(0, N - size), N)
        for some in rows:
            np.matmul(x[some], weight[last].T, out=result[some, last])
    return result[:R]


@cache
def _alike_in_any_number() -> bool:
    """Whether rows of a product have the same bits wherever they stand, and however many they are, from two on."""
    generator = np.random.default_rng(0)
    row, weight = (generator.standard_normal((rows, 384), np.float32) for rows in (1, _MOST_OUTPUTS))
    products = [np.repeat(row, count, axis=0) @ weight.T for count in range(2, _MOST_ROWS + 1)]
    return all((product == products[0][0]).all() for product in products)


def _add_block(x: Array, block: "Block", keys: Array, values: Array, positions: NDArray[np.int32]) -> None:
    """Adds a layer's two halves to (R, C), and its keys and values to (B, H, S, D) caches."""
    R, C = x.shape
    attention, feed_forward = block.attention, block.feed_forward
    qkv = _linear(_norm(x, block.attention_norm), attention.qkv)
    q, k, v = qkv.reshape(R, 3, attention.heads, -1).swapaxes(0, 1)  # each (R, H, D)
    for row, position in enumerate(positions.tolist()):
        keys[row, :, position] = k[row]
        values[row, :, position] = v[row]
    attended = _attend(q, keys, values, positions)  # (R, H, D)
    x += _linear(attended.reshape(R, C), attention.output)
    hidden = _gelu(_linear(_norm(x, block.feed_forward_norm), feed_forward.up))
    x += _linear(hidden, feed_forward.down)


def _attend(q: Array, keys: Array, values: Array, positions: NDArray[np.int32]) -> Array:
    """Each row of (R, H, D) attends to its own slot of (B, H, S, D) up to its position; (R, H, D)."""
    q = q[:, :, None] * np.float32(q.shape[2] ** -0.5)  # (R, H, 1, D)
    attended = np.empty_like(q)

    for row, length in enumerate((positions + 1).tolist()):
        weights = q[row] @ keys[row, :, :length].swapaxes(1, 2)  # (H, 1, length)
        weights -= np.maximum.reduce(weights, axis=2, keepdims=True)
        np.exp(weights, out=weights)
        np.matmul(weights, values[row, :, :length], out=attended[row])
        attended[row] /= np.add.reduce(weights, axis=2, keepdims=True)
    return attended[:, :, 0]


def _linear(x: Array, layer: Any) -> Array:
    result = product(x, view(layer.weight))
    result += view(layer.bias)
    return result


def _norm(x: Array, layer: Any) -> Array:
    """LayerNorm (Ba et al. 2016) of the rows."""
    share = np.float32(1 / x.shape[1])
    mean: Array = np.add.reduce(x, axis=1, keepdims=True) * share
    centred: Array = x - mean
    variance: Array = np.add.reduce(centred * centred, axis=1, keepdims=True) * share
    centred /= np.sqrt(variance + np.float32(layer.eps))
    centred *= view(layer.weight)
    centred += view(layer.bias)
    return centred


def _gelu(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, section 2), as x times the sigmoid of twice what tanh gets."""
    twice = np.float32(-2 * math.sqrt(2 / math.pi))
    gate = x * x
    gate *= twice * np.float32(0.044715)
    gate += twice
    gate *= x
    np.exp(gate, out=gate)
    gate += np.float32(1)
    np.divide(x, gate, out=gate)
    return gate
