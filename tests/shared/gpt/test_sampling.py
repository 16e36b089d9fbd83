import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument
from shared.gpt.sampling import (
    SamplingParameters,
    distribution,
    draw,
    log_probabilities,
    penalise_repetition,
    sample,
    uniform,
)

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    result: np.ndarray = exponents / exponents.sum()
    return result


@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0),
        SamplingParameters(temperature=0.5),
        SamplingParameters(temperature=2.0, top_k=4),
        SamplingParameters(temperature=1.0, top_p=0.9),
        SamplingParameters(temperature=1.0, min_p=0.2),
    ],
)
def test_draws_follow_the_exact_distribution(parameters: SamplingParameters) -> None:
    count = 20_000
    expected = distribution(LOGITS, parameters)
    counts = np.bincount([sample(LOGITS, parameters, 1234, i) for i in range(count)], minlength=LOGITS.size)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - count * expected)[possible] ** 2 / (count * expected[possible])).sum()
    # The 99.9 % point of five degrees of freedom; fewer only lower it.
    assert chi_square < 20.5


def test_temperature_divides_the_logits() -> None:
    assert distribution(LOGITS, SamplingParameters(temperature=0.5)) == pytest.approx(softmax(LOGITS / 0.5))


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert sample(LOGITS, SamplingParameters(temperature=0.0), 5, 5) == 0
    assert distribution(LOGITS, SamplingParameters(temperature=0.0)).tolist() == [1, 0, 0, 0, 0, 0]


def test_top_k_keeps_the_k_likeliest() -> None:
    kept = distribution(LOGITS, SamplingParameters(temperature=1.0, top_k=2))
    assert kept[:2] == pytest.approx(softmax(LOGITS[:2]))
    assert not kept[2:].any()


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=600), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(values: list[float], top_p: float) -> None:
    logits = np.array(values, np.float32)
    whole = softmax(logits)
    kept = distribution(logits, SamplingParameters(temperature=1.0, top_p=top_p)) > 0
    assert whole[kept].sum() >= top_p - 1e-9
    assert whole[kept].sum() - whole[kept].min() < top_p + 1e-9
    assert whole[kept].min() >= whole[~kept].max(initial=0.0)


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    kept = distribution(LOGITS, SamplingParameters(temperature=1.0, min_p=0.2)) > 0
    assert kept.tolist() == (softmax(LOGITS) >= 0.2 * softmax(LOGITS).max()).tolist()


def test_the_repetition_penalty_lowers_positive_and_negative_logits_alike() -> None:
    penalised = penalise_repetition(LOGITS, np.array([0, 0, 5], np.int32), 2.0)
    assert penalised.tolist() == [1.0, 1.0, 0.5, 0.0, -1.0, -6.0]
    assert LOGITS[0] == 2.0


def test_a_masked_token_is_never_drawn() -> None:
    masked = LOGITS.copy()
    masked[0] = -np.inf
    assert 0 not in {sample(masked, SamplingParameters(temperature=5.0), 1, i) for i in range(500)}


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    assert len({uniform(seed, position) for seed in range(50) for position in range(50)}) == 2500


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    numbers = np.array([uniform(seed, position) for seed in range(100) for position in range(100)])
    counts = np.histogram(numbers, bins=20, range=(0.0, 1.0))[0]
    # The 99.9 % point of 19 degrees of freedom.
    assert ((counts - 500.0) ** 2 / 500.0).sum() < 43.8


@given(st.floats(0, 1, exclude_max=True))
def test_no_number_draws_an_impossible_token(number: float) -> None:
    probabilities = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(probabilities, number) == (1 if number < 0.3 else 3)


def test_log_probabilities_are_those_of_the_softmax() -> None:
    assert np.exp(log_probabilities(LOGITS)) == pytest.approx(softmax(LOGITS))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", math.nan),
        ("min_p", -0.5),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field} is "):
        SamplingParameters(**{field: value})  # type: ignore[arg-type]
