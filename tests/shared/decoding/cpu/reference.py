"""A GPT in NumPy that rounds where the formats of the CPU decoder round, and nowhere else.

Shapes: T tokens, C inputs, N outputs, H heads, D head width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.decoding.weight_format import WeightFormat
from shared.gpt.model import GPT

# Inputs of a product that have one scale.
PART = 128


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bf16 number, of two equally near ones to the even one."""
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return np.asarray(rounded.astype(np.uint32).view(np.float32), np.float64)


def to_bytes(x: np.ndarray) -> np.ndarray:
    """Rounds each row (…, C) to 255 equally spaced numbers, of which the outermost are its largest."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.asarray(np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)) * scale)


def reference_forward(model: GPT, tokens: Sequence[int], weights: WeightFormat) -> np.ndarray:
    """Returns the logits (T, V) after each token."""

    def rounded(weight: Any) -> np.ndarray:
        matrix = np.asarray(weight, np.float64)
        match weights:
            case WeightFormat.FP32:
                return matrix
            case WeightFormat.BF16:
                return to_bf16(matrix)
            case WeightFormat.INT8:
                return to_bytes(matrix)

    def product(x: np.ndarray, layer: Any) -> np.ndarray:
        if weights is WeightFormat.INT8:
            x = np.concatenate([to_bytes(x[:, c : c + PART]) for c in range(0, x.shape[1], PART)], axis=1)
        result: np.ndarray = x @ rounded(layer.weight).T
        return np.asarray(result + np.asarray(layer.bias)) if "bias" in layer else result

    def norm(x: np.ndarray, layer: Any) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        scaled: np.ndarray = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + layer.eps)
        return np.asarray(scaled * np.asarray(layer.weight) + np.asarray(layer.bias))

    def attend(x: np.ndarray) -> np.ndarray:
        T, H, D = len(x), model.config.heads, model.config.head_width
        q, k, v = x.reshape(T, 3, H, D).transpose(1, 2, 0, 3)  # (H, T, D)
        if weights is not WeightFormat.FP32:
            k, v = to_bf16(k), to_bf16(v)
        scores = np.where(np.tri(T, dtype=bool), q @ k.transpose(0, 2, 1) / np.sqrt(D), -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended: np.ndarray = shares / shares.sum(axis=-1, keepdims=True) @ v
        return attended.transpose(1, 0, 2).reshape(T, H * D)

    x = rounded(model.token_embedding.weight)[list(tokens)] + np.asarray(model.position_embedding.weight)[: len(tokens)]
    for block in model.blocks:
        x = x + product(attend(product(norm(x, block.attention_norm), block.attention.qkv)), block.attention.output)
        u = product(norm(x, block.feed_forward_norm), block.feed_forward.up)
        x = x + product(u / (1 + np.exp(-1.59576912160573 * (u + 0.044715 * u**3))), block.feed_forward.down)
    return product(norm(x, model.final_norm), model.token_embedding if model.config.tied_head else model.head)
