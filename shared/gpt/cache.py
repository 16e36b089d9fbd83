"""Keys and values of what was read, in fixed slots: one slot a row, one position a token.

Shapes: B slots, T tokens, S positions of the context, H heads, D head width.
"""

import mlx.core as mx

from shared.gpt.config import GPTConfig


class LayerCache:
    """One layer's keys and values, (B, H, S, D) each. `decode` attends to all S positions, the unread ones masked, so
    that a row's numbers depend neither on its neighbours' lengths nor on their number."""

    def __init__(self, slots: int, heads: int, context_length: int, head_width: int) -> None:
        self.keys = mx.zeros((slots, heads, context_length, head_width))
        self.values = mx.zeros((slots, heads, context_length, head_width))
        self._slots = mx.arange(slots)
        self._positions = mx.arange(context_length)
        self._scale = head_width**-0.5

    def prefill(self, q: mx.array, k: mx.array, v: mx.array, slot: int, start: int) -> mx.array:
        """Stores (1, H, T, D) keys and values from position `start` of a slot on and attends causally; (1, H, T, D)."""
        end = start + q.shape[2]
        self.keys[slot, :, start:end] = k[0]
        self.values[slot, :, start:end] = v[0]
        keys, values = self.keys[slot : slot + 1, :, :end], self.values[slot : slot + 1, :, :end]  # (1, H, end, D)
        return mx.fast.scaled_dot_product_attention(q, keys, values, scale=self._scale, mask="causal")

    def decode(self, q: mx.array, k: mx.array, v: mx.array, positions: mx.array) -> mx.array:
        """Stores (B, H, 1, D) keys and values at each slot's position (B,) and attends up to it; (B, H, 1, D)."""
        self.keys[self._slots, :, positions] = k[:, :, 0]  # (B, H, D)
        self.values[self._slots, :, positions] = v[:, :, 0]
        read = (self._positions <= positions[:, None])[:, None, None]  # (B, 1, 1, S)
        return mx.fast.scaled_dot_product_attention(q, self.keys, self.values, scale=self._scale, mask=read)


class KVCache:
    """The cache of a whole model for a fixed number of slots."""

    def __init__(self, config: GPTConfig, slots: int) -> None:
        self.layers = [
            LayerCache(slots, config.heads, config.context_length, config.head_width) for _ in range(config.layers)
        ]

    @property
    def arrays(self) -> list[mx.array]:
        """Every array, so that one `mx.eval` brings the whole cache up to date."""
        return [array for layer in self.layers for array in (layer.keys, layer.values)]
