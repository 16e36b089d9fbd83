"""Draws and losses on an NVIDIA GPU, or on an emulation of one."""

from dataclasses import replace

import numpy as np
import pytest

from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import Span
from tests.decoders import cuda_decoder
from tests.shared.decoding.cuda.models import TOLERANCE, decoder_for, model_of
from tests.shared.decoding.test_decoders import (
    CONFIG,
    spans_of,
)
from tests.shared.decoding.test_draws import assert_draws_follow_the_distribution, decoder_of, draws
from tests.shared.gpt.random_models import forward, full_forward, random_text

pytestmark = pytest.mark.slow


def test_scores_are_the_losses_of_the_next_tokens() -> None:
    decoder = decoder_for()
    tokens = random_text(CONFIG, 3, 90)
    losses = [
        loss
        for span in spans_of(2, 0, tokens[:-1])
        for loss in decoder.score(span, tokens[span.start + 1 :][: len(span.tokens)])
    ]
    logits = full_forward(model_of(CONFIG), tokens[:-1]).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(89), tokens[1:]]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=TOLERANCE)


def test_the_logits_after_a_prompt_stay_while_others_are_computed() -> None:
    decoder = decoder_for(slots=20)
    last = [decoder.logits(Span(slot, 0, random_text(CONFIG, slot, 3)))[1] for slot in range(10)]
    held = [np.array(row) for row in last]
    forward(decoder, [Span(slot, 0, (1,)) for slot in range(10, 20)])
    rows = [*decoder.forward([Span(slot, 1, (2,)) for slot in range(10, 20)]), *last]
    assert np.array_equal([np.array(row) for row in last], held)
    drawn = decoder.draw([TemperatureSampling(row, 0.0, 0, 0, None) for row in rows])
    assert drawn == [int(np.array(row).argmax()) for row in rows]


@pytest.mark.parametrize("vocabulary_size", [2, 97, 1025])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.3, 100.0])
def test_a_draw_follows_the_exact_distribution(vocabulary_size: int, temperature: float) -> None:
    decoder = decoder_for(replace(CONFIG, layers=1, vocabulary_size=vocabulary_size))
    rows = decoder.forward([Span(2, 0, (1, 0, 1)), Span(1, 0, (1,))])
    assert_draws_follow_the_distribution(decoder, rows, temperature)


def test_any_number_of_draws_from_one_row_has_room() -> None:
    """The emulation notices what is written beyond a buffer."""
    decoder = decoder_for()
    (row,) = decoder.forward([Span(0, 0, (1,))])
    drawn = decoder.draw([TemperatureSampling(row, 1.0, seed, 0, None) for seed in range(200)])
    assert drawn[:3] == [decoder.draw([TemperatureSampling(row, 1.0, seed, 0, None)])[0] for seed in range(3)]
    assert len(drawn) == 200


def test_finite_logits_of_any_size_have_a_likeliest_token() -> None:
    decoder = decoder_of(cuda_decoder, [0.0, 3e38, -3e38, 1.0])
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert decoder.draw([*draws(row, 0.0), *draws(row, 1.0), *draws(row, 1e-45)]) == [1, 1, 1]
