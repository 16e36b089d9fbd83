"""Small random models with random biases and LayerNorms, texts for them, and their logits.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from shared.decoding.decoder import Decoder
from shared.decoding.spans import Span
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of

seeds = st.integers(0, 2**32 - 1)


def random_model(config: GPTConfig, seed: int) -> GPT:
    """Returns a model of random parameters, large enough that each one changes the logits, which are a few units."""
    generator = np.random.default_rng(seed)
    model = GPT(config)

    def value(name: str, shape: tuple[int, ...]) -> mx.array:
        numbers = generator.standard_normal(shape)
        if "embedding" in name or name == "head.weight":
            numbers *= 0.3
        elif len(shape) == 2:
            numbers /= shape[1] ** 0.5
        elif name.endswith("norm.weight"):
            numbers = 1 + 0.3 * numbers
        return mx.array(numbers.astype(np.float32))

    model.load_weights([(name, value(name, array.shape)) for name, array in parameters_of(model).items()])
    model.eval()
    return model


@st.composite
def models(draw: st.DrawFn, longest_context: int = 21) -> GPT:
    """Models of any shape."""
    heads = draw(st.integers(1, 4))
    config = GPTConfig(
        layers=draw(st.integers(1, 3)),
        # The LayerNorm of fewer numbers can amplify rounding.
        width=heads * draw(st.integers(-(-8 // heads), 11)),
        heads=heads,
        hidden_width=draw(st.integers(1, 40)),
        context_length=draw(st.integers(2, longest_context)),
        vocabulary_size=draw(st.integers(2, 60)),
        tied_head=draw(st.booleans()),
    )
    return random_model(config, draw(seeds))


def random_tokens(config: GPTConfig, seed: int, *shape: int) -> np.ndarray:
    """Returns random tokens of the vocabulary."""
    return np.random.default_rng(seed).integers(0, config.vocabulary_size, shape)


def random_text(config: GPTConfig, seed: int, length: int) -> tuple[int, ...]:
    """As many tokens as a span takes them."""
    return tuple(random_tokens(config, seed, length).tolist())


def full_forward(model: GPT, tokens: Sequence[int]) -> np.ndarray:
    """Returns the logits (T, V) after each token, from the plain forward."""
    return np.asarray(model(mx.array([tokens]))[0])


def forward(decoder: Decoder, spans: Sequence[Span]) -> list[np.ndarray]:
    """Returns a copy of the logits (V,) after each span."""
    return [np.array(logits) for logits in decoder.forward(spans)]
