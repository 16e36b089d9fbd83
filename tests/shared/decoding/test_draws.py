"""The draws of all decoders for requests with only a temperature, compared with the exact distribution.

Shapes: K rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from shared.decoding import mlx_decoder as mlx_module
from shared.decoding.cpu import decoder as cpu_module
from shared.decoding.cuda import decoder as cuda_module
from shared.decoding.decoder import Decoder
from shared.decoding.sampling import TemperatureSampling, uniform
from shared.decoding.spans import Span
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.decoders import cpu_decoder, cuda_decoder, mlx_decoder
from tests.shared.gpt.random_models import random_model, random_text

CONFIG = GPTConfig(layers=1, width=16, heads=2, hidden_width=8, context_length=30, vocabulary_size=97, tied_head=False)
SLOTS = 4

MakeDecoder = Callable[[GPT, int], Decoder]
both = pytest.mark.parametrize("make", [partial(cpu_decoder, threads=2), mlx_decoder], ids=["cpu", "mlx"])
each = pytest.mark.parametrize(
    "make",
    [partial(cpu_decoder, threads=2), mlx_decoder, pytest.param(cuda_decoder, marks=pytest.mark.slow)],
    ids=["cpu", "mlx", "cuda"],
)


def decoder_of(make: MakeDecoder, logits: list[float]) -> Decoder:
    """Returns a decoder whose logits (V,) are the same after every token."""
    model = random_model(replace(CONFIG, vocabulary_size=len(logits)), 1)
    model.final_norm.weight = mx.zeros(CONFIG.width)
    model.final_norm.bias = (mx.arange(CONFIG.width) == 0).astype(mx.float32)
    model.head.weight[:, 0] = mx.array(logits)
    return make(model, SLOTS)


def some_rows(decoder: Decoder, vocabulary_size: int) -> Sequence[Any]:
    """Returns logits after a prompt and after single tokens of other slots, computed in one step."""
    text = random_text(replace(CONFIG, vocabulary_size=vocabulary_size), 1, 20)
    return decoder.forward([Span(2, 0, text), *(Span(slot, 0, (text[slot],)) for slot in (0, 1, 3))])


def draws(row: Any, temperature: float, masked: int | None = None, count: int = 1) -> list[TemperatureSampling]:
    return [TemperatureSampling(row, temperature, seed, 3 * seed, masked) for seed in range(count)]


def assert_drawn(draw: TemperatureSampling, logits: np.ndarray, token: int | None) -> None:
    """Asserts that the number of a draw is in the token's part of the unit interval, up to rounding."""
    values = logits.astype(np.float64)
    if draw.masked is not None:
        values[draw.masked] = -np.inf
    if draw.temperature == 0.0:
        assert token == values.argmax()
        return
    weights = np.exp((values - values.max()) / draw.temperature)
    sums = np.cumsum(weights / weights.sum())
    assert token is not None and weights[token] > 0
    number = uniform(draw.seed, draw.position)
    assert (sums[token - 1] if token else 0.0) - 1e-5 <= number <= sums[token] + 1e-5


def assert_draws_follow_the_distribution(decoder: Decoder, rows: Sequence[Any], temperature: float) -> None:
    # Every row, with and without the likeliest token, with several seeds as for the samples of one prompt.
    wanted = [
        draw
        for row in rows
        for masked in (None, int(np.asarray(row).argmax()), len(np.asarray(row)) - 1)
        for draw in draws(row, temperature, masked, 7)
    ]
    tokens = decoder.draw(wanted)
    for draw, token in zip(wanted, tokens, strict=True):
        assert_drawn(draw, np.asarray(draw.logits), token)
    # In any order, and each alone.
    assert decoder.draw(wanted[::-1]) == tokens[::-1]
    assert [decoder.draw([draw])[0] for draw in wanted] == tokens


@both
@pytest.mark.parametrize("vocabulary_size", [2, 16, 97, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.3, 1.0, 100.0])
def test_a_draw_follows_the_exact_distribution(make: MakeDecoder, vocabulary_size: int, temperature: float) -> None:
    model = random_model(replace(CONFIG, vocabulary_size=vocabulary_size), 1)
    decoder = make(model, SLOTS)
    assert_draws_follow_the_distribution(decoder, some_rows(decoder, vocabulary_size), temperature)


@each
def test_temperature_zero_takes_the_first_of_equally_likely_tokens(make: MakeDecoder) -> None:
    decoder = decoder_of(make, [0.0, 3.0, -1.0, 3.0, 3.0])
    (row,) = decoder.forward([Span(1, 0, (1,))])
    wanted = [*draws(row, 0.0), *draws(row, 0.0, masked=1), *draws(row, 0.0, masked=3)]
    assert decoder.draw(wanted) == [1, 3, 1]


@each
@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45, 5e-324])
def test_the_lowest_temperature_takes_a_likeliest_token(make: MakeDecoder, temperature: float) -> None:
    decoder = decoder_of(make, [0.0, 3.0, -1.0, 3.0, 2.98])
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert set(decoder.draw(draws(row, temperature, count=20))) == {1, 3}
    assert set(decoder.draw(draws(row, temperature, 1, 20))) == {3}


@each
@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(
    make: MakeDecoder, number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cpu_module, mlx_module):
        monkeypatch.setattr(module, "uniform", lambda seed, position: number)
    monkeypatch.setattr(cuda_module, "uniforms", lambda seeds, positions: np.full(len(seeds), number))
    # Only tokens 5 to 2493 and 2500 are possible, the last masked.
    logits = np.full(3000, -1000.0)
    logits[5:2494] = np.sin(np.arange(2489))
    logits[2500] = 0.0
    decoder = decoder_of(make, logits.tolist())
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert decoder.draw(draws(row, 1.0, masked=2500)) == [2493 if number else 5]


@each
@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
@pytest.mark.parametrize("place", [0, 50, 96])
def test_logits_that_are_not_finite_draw_nothing(make: MakeDecoder, value: float, place: int) -> None:
    logits = np.zeros(97)
    logits[place] = value
    decoder = decoder_of(make, logits.tolist())
    (row,) = decoder.forward([Span(1, 0, (1,))])
    wanted = [*draws(row, 0.0), *draws(row, 1.0), *draws(row, 1.0, masked=place)]
    assert decoder.draw(wanted) == [None, None, None]


@each
def test_only_the_row_that_is_not_finite_draws_nothing(make: MakeDecoder) -> None:
    model = random_model(CONFIG, 1)
    model.token_embedding.weight[96] = mx.nan
    decoder = make(model, SLOTS)
    rows = decoder.forward([Span(0, 0, (1,)), Span(1, 0, (96,)), Span(3, 0, (2,))])
    tokens = decoder.draw([draw for row in rows for draw in draws(row, 1.0, count=2)])
    assert [token is None for token in tokens] == [False, False, True, True, False, False]


@each
def test_no_rows_draw_nothing(make: MakeDecoder) -> None:
    assert make(random_model(CONFIG, 1), SLOTS).draw([]) == []
