"""Penalties and bias, which change a model's logits before a token is drawn."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.decoding.sampling import SamplingParameters, adjust, sample
from shared.errors import InvalidArgument

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
LOGITS.flags.writeable = False


def exact_adjustment(
    logits: np.ndarray, parameters: SamplingParameters, prompt: list[int], generated: dict[int, int]
) -> list[float]:
    """Repetition penalty (Keskar et al. 2019), then OpenAI's presence and frequency penalties and bias; token by token,
    in 64 bits."""
    bias = dict(parameters.logit_bias)
    values = []
    for token, value in enumerate(logits.tolist()):
        if token in prompt or token in generated:
            value *= parameters.repetition_penalty if value < 0 else 1 / parameters.repetition_penalty
        if token in generated:
            value -= parameters.presence_penalty
        value -= generated.get(token, 0) * parameters.frequency_penalty
        values.append(value + bias.get(token, 0.0))
    return values


adjustments = st.fixed_dictionaries(
    {
        "repetition_penalty": st.just(1.0) | st.floats(0.5, 2),
        "presence_penalty": st.just(0.0) | st.floats(-2, 2),
        "frequency_penalty": st.just(0.0) | st.floats(-2, 2),
    }
)


@settings(max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    adjustments,
    st.dictionaries(st.integers(0, 299), st.floats(-100, 100), max_size=5),
)
def test_each_token_is_adjusted_by_every_rule(
    seed: int, size: int, values: dict[str, float], bias: dict[int, float]
) -> None:
    generator = np.random.default_rng(seed)
    logits = (4 * generator.standard_normal(size)).astype(np.float32)
    prompt = generator.integers(0, size, generator.integers(0, 30)).tolist()
    generated = Counter(generator.integers(0, size, generator.integers(0, 30)).tolist())
    bias = {token: value for token, value in bias.items() if token < size}
    parameters = SamplingParameters(**values, logit_bias=tuple(bias.items()))  # type: ignore[arg-type]
    logits.flags.writeable = False
    actual = adjust(logits, parameters, prompt, generated)
    assert actual.dtype == np.float32
    assert actual == pytest.approx(exact_adjustment(logits, parameters, prompt, generated), rel=1e-5, abs=1e-5)


def test_the_repetition_penalty_lowers_positive_and_negative_logits_once() -> None:
    parameters = SamplingParameters(repetition_penalty=2.0)
    assert adjust(LOGITS, parameters, [0, 0, 5], {0: 3, 4: 1}).tolist() == [1.0, 1.0, 0.5, 0.0, -2.0, -6.0]


def test_the_presence_penalty_applies_once_to_each_generated_token() -> None:
    parameters = SamplingParameters(presence_penalty=0.5)
    assert adjust(LOGITS, parameters, [1], {0: 3, 4: 1}).tolist() == [1.5, 1.0, 0.5, 0.0, -1.5, -3.0]


def test_the_frequency_penalty_applies_once_per_draw_of_a_token() -> None:
    parameters = SamplingParameters(frequency_penalty=-0.5)
    assert adjust(LOGITS, parameters, [1], {0: 3, 4: 1}).tolist() == [3.5, 1.0, 0.5, 0.0, -0.5, -3.0]


def test_the_bias_is_added_to_its_tokens() -> None:
    parameters = SamplingParameters(logit_bias=((1, -100.0), (5, 4.0)))
    assert adjust(LOGITS, parameters, [], {}).tolist() == [2.0, -99.0, 0.5, 0.0, -1.0, 1.0]


def test_the_repetition_penalty_comes_before_additions() -> None:
    # The other way round, the first logit would be (2 - 0.5 - 2 * 0.25 + 3) / 2.
    parameters = SamplingParameters(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((0, 3.0),)
    )
    assert adjust(LOGITS, parameters, [], {0: 2})[0] == 2.0 / 2 - 0.5 - 2 * 0.25 + 3


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=0.3, top_k=3, top_p=0.5, min_p=0.1),
        # No token was generated, so these penalties do not apply.
        SamplingParameters(presence_penalty=1.0, frequency_penalty=1.0),
    ],
    ids=str,
)
def test_unchanged_logits_are_not_copied(parameters: SamplingParameters) -> None:
    assert adjust(LOGITS, parameters, [1, 2], {}) is LOGITS


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(repetition_penalty=2.0),
        SamplingParameters(presence_penalty=1.0),
        SamplingParameters(frequency_penalty=1.0),
        SamplingParameters(logit_bias=((0, 1.0),)),
    ],
    ids=str,
)
def test_the_models_own_logits_do_not_change(parameters: SamplingParameters) -> None:
    logits = LOGITS.copy()
    assert not np.shares_memory(adjust(logits, parameters, [0], {0: 1}), logits)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize("penalty", [1e-30, 1e-40, 5e-324])
def test_the_smallest_repetition_penalty_leaves_tokens_to_draw(penalty: float) -> None:
    parameters = SamplingParameters(temperature=1.0, repetition_penalty=penalty)
    filtered = replace(parameters, top_p=0.9)
    logits = adjust(LOGITS, parameters, [1], {})
    assert np.isfinite(logits).all()
    for each in (parameters, filtered, replace(parameters, temperature=0.0)):
        assert {sample(logits, each, seed, 0) for seed in range(20)} == {1}


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=0.0, repetition_penalty=3.0),
        SamplingParameters(temperature=0.0, presence_penalty=1.5),
        SamplingParameters(temperature=0.0, frequency_penalty=0.6),
        SamplingParameters(temperature=0.0, logit_bias=((0, -100.0),)),
    ],
    ids=str,
)
def test_temperature_zero_follows_penalties_and_bias(parameters: SamplingParameters) -> None:
    assert sample(adjust(LOGITS, parameters, [], {0: 2}), parameters, 1, 1) == 1


@pytest.mark.parametrize("bias", [-100.5, 101.0, math.nan, -math.inf])
def test_a_bias_out_of_range_is_rejected_by_its_token(bias: float) -> None:
    with pytest.raises(InvalidArgument, match=r"^logit_bias of token 7 is .*, but must be from -100 to 100\.$"):
        SamplingParameters(logit_bias=((1, 1.0), (7, bias)))


def test_too_many_biases_are_rejected() -> None:
    SamplingParameters(logit_bias=tuple((token, 1.0) for token in range(300)))
    with pytest.raises(InvalidArgument, match=r"^logit_bias has 301 tokens, but may have at most 300"):
        SamplingParameters(logit_bias=tuple((token, 1.0) for token in range(301)))
