"""GPT-2 in MLX: learned positions, pre-LayerNorm, GELU-tanh, tied or untied head.

Shapes: B rows, T tokens, S positions of the context, H heads, D head width, C width, V vocabulary.
Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and the published GPT-2 weights.
"""

import math
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig
from shared.gpt.operations import add_norm, causal_attention, dropout, gelu, linear

# (queries, keys, values), each (B, H, T, D), to the attended values (B, H, T, D).
Attend = Callable[[mx.array, mx.array, mx.array], mx.array]


class Dropout(nn.Module):
    """Sets a share `rate` of the numbers to zero in training; does nothing otherwise."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def __call__(self, x: mx.array) -> mx.array:
        """Any shape to the same shape."""
        return self._drop(x, x.shape)

    def vectors(self, x: mx.array) -> mx.array:
        """(..., D) to the same shape; the D numbers of a vector are kept or set to zero together."""
        return self._drop(x, (*x.shape[:-1], 1))

    def _drop(self, x: mx.array, shape: Sequence[int]) -> mx.array:
        return dropout(x, self.rate, shape) if self.training and self.rate > 0 else x


class Attention(nn.Module):
    """Multi-head self-attention; the caller provides the attention of queries to keys."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def __call__(self, x: mx.array, attend: Attend) -> mx.array:
        """(B, T, C) to (B, T, C)."""
        B, T, C = x.shape
        q, k, v = (
            each.reshape(B, T, self.heads, C // self.heads).transpose(0, 2, 1, 3)  # (B, H, T, D)
            for each in mx.split(linear(x, self.qkv), 3, axis=-1)
        )
        attended = attend(q, k, v).transpose(0, 2, 1, 3).reshape(B, T, C)  # (B, T, C)
        return linear(attended, self.output)


class FeedForward(nn.Module):
    """Two layers with GELU in its tanh form between them (Hendrycks & Gimpel 2016, section 2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden_width)
        self.down = nn.Linear(config.hidden_width, config.width)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, C) to (B, T, C)."""
        return linear(gelu(linear(x, self.up)), self.down)


class Block(nn.Module):
    """One layer: attention and feed-forward, each with a LayerNorm before and a residual sum after it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def __call__(
        self, x: mx.array, normed: mx.array, attend: Attend, following: nn.LayerNorm
    ) -> tuple[mx.array, mx.array]:
        """Takes the residual stream (B, T, C) and its `attention_norm`; returns the stream and its `following` norm."""
        x, normed = add_norm(x, self.dropout(self.attention(normed, attend)), self.feed_forward_norm)
        return add_norm(x, self.dropout(self.feed_forward(normed)), following)


class GPT(nn.Module):
    """The whole model.

    Weights start as in GPT-2: N(0, 0.02), and N(0, 0.02 / sqrt(2 layers)) for projections to the residual stream.
    Dropout applies to the embeddings, to the outputs of attention and feed-forward, and in attention to whole values:
    in each head, all queries of a row miss the same ones. For one query this is dropout of its attention weights, as in
    GPT-2, but it stays outside the attention, so that every backend can fuse that.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.dropout = Dropout(config.dropout)
        self.blocks = [Block(config) for _ in range(config.layers)]
        self.final_norm = nn.LayerNorm(config.width)
        if not config.tied_head:
            self.head = nn.Linear(config.width, config.vocabulary_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_scale = 0.02 / math.sqrt(2 * self.config.layers)
        weights = []
        for name, value in parameters_of(self).items():
            if value.ndim == 2:
                scale = (
                    residual_scale if name.endswith(("attention.output.weight", "feed_forward.down.weight")) else 0.02
                )
                weights.append((name, mx.random.normal(value.shape, scale=scale)))
            elif name.endswith("bias"):
                weights.append((name, mx.zeros_like(value)))
        self.load_weights(weights, strict=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Returns the logits (B, T, V) after each of (B, T) tokens; every row starts at position 0."""
        return self.logits(self.hidden(tokens))

    def hidden(self, tokens: mx.array, kept: mx.array | None = None) -> mx.array:
        """Returns the final hidden states (B, T, C) of (B, T) tokens; every row starts at position 0.

        A token for which `kept` (B, T, 1) is 0 is masked: the model sees its position only. Raises `InvalidArgument` if
        the tokens do not fit the context.
        """
        self.check_fits(tokens.shape[1])
        scale = self.config.head_width**-0.5

        def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return causal_attention(q, k, self.dropout.vectors(v), scale)

        return self.through_blocks(self.embed(tokens, mx.arange(tokens.shape[1]), kept), [attend] * self.config.layers)

    def check_fits(self, tokens: int) -> None:
        """Raises `InvalidArgument` if the context is shorter than this number of tokens."""
        if tokens > self.config.context_length:
            raise InvalidArgument(f"{tokens} tokens do not fit the context of {self.config.context_length}.")

    def through_blocks(self, x: mx.array, attends: Sequence[Attend]) -> mx.array:
        """Returns the final hidden states (B, T, C) of embedded tokens (B, T, C), with one `attend` per block."""
        normed = self.blocks[0].attention_norm(x)
        norms = [*(block.attention_norm for block in self.blocks[1:]), self.final_norm]
        for block, attend, following in zip(self.blocks, attends, norms, strict=True):
            x, normed = block(x, normed, attend, following)
        final: mx.array = normed
        return final

    def logits(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., C) to logits (..., V)."""
        return hidden @ self.head_weight.T

    @property
    def head_weight(self) -> mx.array:
        """The matrix (V, C) that maps hidden states to logits."""
        weight: mx.array = self.token_embedding.weight if self.config.tied_head else self.head.weight
        return weight

    def embed(self, tokens: mx.array, positions: mx.array, kept: mx.array | None = None) -> mx.array:
        """Returns the embeddings (B, T, C) of tokens (B, T) at positions that broadcast to them, those that are not
        `kept` (B, T, 1) without the token's own part."""
        embedded = self.token_embedding(tokens)
        if kept is not None:
            embedded = embedded * kept
        embedded = embedded + self.position_embedding(positions)
        # The type in which the layers compute; the embeddings may have a wider one.
        dropped: mx.array = self.dropout(embedded.astype(self.final_norm.weight.dtype))
        return dropped


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """Returns all parameters by their module names."""
    named: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    return named
