import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.decoding.sampling import (
    SamplingParameters,
    candidates,
    draw,
    log_probabilities,
    sample,
    to_bits,
    uniform,
    uniforms,
)
from shared.errors import InvalidArgument

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits.astype(np.float64) - logits.max())
    result: np.ndarray = exponents / exponents.sum()
    return result


def exact_distribution(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    """Computes the distribution token by token, in 64 bits.

    The order is that of Hugging Face's `generate`: temperature, top-k, top-p, min-p, each on the result of the one
    before.
    """
    values = logits.tolist()
    weights = [math.exp((value - max(values)) / parameters.temperature) for value in values]
    kept = sorted(range(len(values)), key=lambda token: -weights[token])[: parameters.top_k or None]
    enough = parameters.top_p * sum(weights[token] for token in kept)
    mass, nucleus = 0.0, []
    for token in kept:
        if mass >= enough:
            break
        mass += weights[token]
        nucleus.append(token)
    likely = [token for token in nucleus if weights[token] >= parameters.min_p * max(weights)]
    total = sum(weights[token] for token in likely)
    result = np.zeros(len(values))
    for token in likely:
        result[token] = weights[token] / total
    return result


def distribution(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    """Returns the probabilities (V,) of a draw at a temperature above 0."""
    tokens, weights = candidates(logits, parameters)
    probabilities = np.zeros(logits.shape)
    probabilities[slice(None) if tokens is None else tokens] = weights / weights.sum(dtype=np.float64)
    return probabilities


def highest_chance_chi_square(freedom: int) -> float:
    """Returns the value that a chi-square with these degrees of freedom exceeds once in a million times
    (Wilson & Hilferty 1931, "The distribution of chi-square")."""
    normal = 4.753424
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + normal * spread**0.5) ** 3)


def assert_drawn_from(probabilities: np.ndarray, counts: np.ndarray) -> None:
    """Asserts that counts follow probabilities (Pearson 1900), with rare tokens counted together."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    if expected.size > 1:
        assert ((observed - expected) ** 2 / expected).sum() < highest_chance_chi_square(expected.size - 1)


PARAMETERS = [
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.4),
    SamplingParameters(temperature=3.0),
    SamplingParameters(temperature=1.5, top_k=5),
    SamplingParameters(temperature=1.0, top_p=0.8),
    SamplingParameters(temperature=1.0, min_p=0.15),
    SamplingParameters(temperature=2.0, top_k=6, top_p=0.7),
    SamplingParameters(temperature=2.0, top_p=0.9, min_p=0.3),
    SamplingParameters(temperature=0.7, top_k=9, top_p=0.95, min_p=0.02),
]
TWELVE = np.array([1.9, -0.3, 0.8, 0.1, -1.2, 1.4, -2.5, 0.5, -0.7, 2.2, 1.1, -4.0], np.float32)


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_draws_over_seeds_and_positions_follow_the_exact_distribution(parameters: SamplingParameters) -> None:
    drawn = [sample(TWELVE, parameters, seed, position) for seed in range(60) for position in range(50)]
    assert_drawn_from(exact_distribution(TWELVE, parameters), np.bincount(drawn, minlength=TWELVE.size))


@pytest.mark.parametrize("size", [256, 257, 1000])
def test_draws_from_many_tokens_follow_the_exact_distribution(size: int) -> None:
    logits = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    logits[300:600] = -np.inf
    parameters = SamplingParameters(temperature=1.0)
    drawn = [sample(logits, parameters, seed, position) for seed in range(200) for position in range(50)]
    assert_drawn_from(exact_distribution(logits, parameters), np.bincount(drawn, minlength=size))


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 0.4, 1.0, 3.0, 100.0])
def test_a_draw_matches_the_exact_distribution(temperature: float) -> None:
    logits = (4 * np.random.default_rng(1).standard_normal(1000)).astype(np.float32)
    parameters = SamplingParameters(temperature=temperature)
    probabilities = exact_distribution(logits, parameters)
    places = [(seed, position) for seed in range(50) for position in range(40)]
    other = sum(sample(logits, parameters, *place) != draw(probabilities, uniform(*place)) for place in places)
    # Rounding may shift a limit by a millionth.
    assert other <= 2


@settings(max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 700),
    st.builds(
        SamplingParameters,
        temperature=st.floats(0.05, 5),
        top_k=st.integers(0, 40) | st.integers(0, 800),
        top_p=st.floats(0.001, 1),
        min_p=st.floats(0, 1),
    ),
    st.booleans(),
)
def test_the_filters_apply_in_their_order(
    seed: int, size: int, parameters: SamplingParameters, whole_numbers: bool
) -> None:
    logits = (4 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)
    if whole_numbers:
        # Many are equally likely, so that limits fall among equals.
        logits = logits.round()
    expected = exact_distribution(logits, parameters)
    assert distribution(logits, parameters) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_temperature_divides_the_logits() -> None:
    assert distribution(LOGITS, SamplingParameters(temperature=0.5)) == pytest.approx(softmax(LOGITS / 0.5))


def test_temperature_zero_takes_the_likeliest_token() -> None:
    assert sample(LOGITS, SamplingParameters(temperature=0.0), 5, 5) == 0


def test_temperature_zero_takes_the_first_of_equally_likely_tokens() -> None:
    tied = np.array([0.0, 3.0, -1.0, 3.0, 3.0], np.float32)
    greedy = SamplingParameters(temperature=0.0, top_k=2, top_p=0.1, min_p=0.5)
    assert {sample(tied, greedy, seed, position) for seed in range(10) for position in range(10)} == {1}
    assert sample(np.zeros(50_257, np.float32), greedy, 1, 1) == 0


@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("temperature", [1e-10, 1e-45, 5e-324])
def test_the_lowest_temperature_takes_a_likeliest_token(temperature: float, filters: dict[str, float]) -> None:
    parameters = SamplingParameters(temperature=temperature, **filters)  # type: ignore[arg-type]
    tied = np.array([0.0, 3.0, -1.0, 3.0, 2.999], np.float32)
    assert {sample(tied, parameters, seed, 0) for seed in range(20)} == {1, 3}


@pytest.mark.parametrize("parameters", [SamplingParameters(1.0, top_k=2), SamplingParameters(1.0, top_p=0.4)], ids=str)
def test_the_first_of_equally_likely_tokens_at_a_limit_are_kept(parameters: SamplingParameters) -> None:
    tied = np.array([-20.0, 3.0, 3.0, -20.0, 3.0, 3.0], np.float32)
    assert distribution(tied, parameters) == pytest.approx([0, 0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize("top_k", range(1, 8))
def test_top_k_keeps_the_k_likeliest(top_k: int) -> None:
    kept = distribution(LOGITS, SamplingParameters(temperature=1.0, top_k=top_k))
    assert kept[:top_k] == pytest.approx(softmax(LOGITS[:top_k]))
    assert not kept[top_k:].any()


def test_top_p_of_a_flat_distribution_keeps_its_share_of_the_tokens() -> None:
    logits = np.linspace(1e-3, 0, 5000, dtype=np.float32)
    kept = distribution(logits, SamplingParameters(temperature=1.0, top_p=0.9)) > 0
    assert kept.sum() == pytest.approx(4500, abs=2)
    assert kept[:4490].all()


@settings(deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=600), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_reach_the_mass(values: list[float], top_p: float) -> None:
    logits = np.array(values, np.float32)
    whole = softmax(logits)
    kept = distribution(logits, SamplingParameters(temperature=1.0, top_p=top_p)) > 0
    assert whole[kept].sum() >= top_p - 1e-9
    assert whole[kept].sum() - whole[kept].min() < top_p + 1e-9
    assert whole[kept].min() >= whole[~kept].max(initial=0.0) - 1e-9


def test_min_p_keeps_tokens_that_are_likely_enough() -> None:
    kept = distribution(LOGITS, SamplingParameters(temperature=1.0, min_p=0.2)) > 0
    assert kept.tolist() == (softmax(LOGITS) >= 0.2 * softmax(LOGITS).max()).tolist()


def test_a_masked_token_is_never_drawn() -> None:
    masked = LOGITS.copy()
    masked[0] = -np.inf
    assert 0 not in {sample(masked, SamplingParameters(temperature=5.0), 1, i) for i in range(500)}


def test_a_draw_depends_only_on_seed_and_position() -> None:
    logits = TWELVE.copy()
    logits.flags.writeable = False
    parameters = SamplingParameters(temperature=2.0, top_p=0.9)
    places = [(seed, position) for seed in range(20) for position in range(20)]
    first = {place: sample(logits, parameters, *place) for place in places}
    # In another order, after other draws, with another state of NumPy's own generator.
    for seed, position in reversed(places):
        np.random.seed(position)
        sample(logits, SamplingParameters(temperature=1.0), position, seed)
        assert sample(logits, parameters, seed, position) == first[seed, position]


def test_no_two_seeds_and_positions_share_a_number() -> None:
    assert len({uniform(seed, position) for seed in range(100) for position in range(100)}) == 10_000


def test_every_bit_of_the_seed_counts() -> None:
    assert len({uniform(1 << bit, 0) for bit in range(64)} | {uniform(0, 0)}) == 65


def test_many_uniform_numbers_are_those_of_each() -> None:
    places = [(seed, position) for seed in (0, 1, -5, 2**63 + 1, 2**64 - 1) for position in (0, 7, 2**40)]
    assert uniforms(*map(to_bits, zip(*places, strict=True))).tolist() == [uniform(*place) for place in places]
    assert uniforms(to_bits([]), to_bits([])).shape == (0,)


@pytest.mark.parametrize(("seed_step", "position_step"), [(0, 1), (1, 0), (1, 1), (64, 64), (1 << 50, 0)])
def test_uniform_numbers_fill_the_unit_interval_evenly(seed_step: int, position_step: int) -> None:
    numbers = [uniform(7 + i * seed_step, 7 + i * position_step) for i in range(10_000)]
    assert min(numbers) >= 0.0 and max(numbers) < 1.0
    assert_drawn_from(np.full(100, 0.01), np.histogram(numbers, bins=100, range=(0.0, 1.0))[0])


def assert_independent(first: list[float], second: list[float]) -> None:
    """Pairs fill the unit square evenly, and are not correlated."""
    counts = np.histogram2d(first, second, bins=10, range=[(0.0, 1.0)] * 2)[0]
    assert_drawn_from(np.full(100, 0.01), counts.reshape(-1))
    # The correlation of independent numbers has the standard deviation 1 / sqrt(count).
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / len(first) ** 0.5


@pytest.mark.parametrize(
    ("seed_step", "position_step"), [(1, 0), (0, 1), (1, 1), (1, -1), (0, 2), (2, 0), (1 << 63, 0)]
)
def test_uniform_numbers_are_independent_of_their_neighbours(seed_step: int, position_step: int) -> None:
    places = [(seed, position) for seed in range(100) for position in range(1, 101)]
    assert_independent(
        [uniform(*place) for place in places],
        [uniform(seed + seed_step, position + position_step) for seed, position in places],
    )


def test_seed_and_position_swapped_give_another_number() -> None:
    places = [(seed, position) for seed in range(150) for position in range(seed)]
    assert_independent([uniform(*place) for place in places], [uniform(position, seed) for seed, position in places])


def test_the_highest_number_draws_a_possible_token_and_a_late_one() -> None:
    for seed in range(200):
        weights = np.random.default_rng(seed).random(300 + seed, np.float32)
        weights[-40:] = 0.0
        token = draw(weights, 1 - 2**-53)
        assert weights[token] > 0
        assert weights[token + 1 :].sum() < 1e-3


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 2000), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
def test_a_number_draws_the_token_at_which_the_sum_passes_it(seed: int, size: int, zeros: float, number: float) -> None:
    generator = np.random.default_rng(seed)
    weights = generator.random(size) * (generator.random(size) >= zeros)
    weights[generator.integers(size)] = 1.0
    token = draw(weights, number)
    target = number * weights.sum()
    assert weights[token] > 0
    assert weights[:token].sum() <= target * (1 + 1e-9)
    assert weights[: token + 1].sum() >= target * (1 - 1e-9)


@settings(deadline=None)
@given(st.floats(0, 1, exclude_max=True))
def test_no_number_draws_an_impossible_token(number: float) -> None:
    probabilities = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(probabilities, number) == (1 if number < 0.3 else 3)


def test_log_probabilities_agree_with_the_softmax() -> None:
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
        ("repetition_penalty", 100.5),
        ("presence_penalty", -2.1),
        ("presence_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", math.nan),
    ],
)
def test_a_value_out_of_range_is_rejected_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field} is "):
        SamplingParameters(**{field: value})  # type: ignore[arg-type]


def test_the_limits_themselves_are_allowed() -> None:
    SamplingParameters(temperature=100.0, top_p=1.0, min_p=1.0, repetition_penalty=100.0)
    for bound in (-2.0, 2.0):
        SamplingParameters(presence_penalty=bound, frequency_penalty=bound, logit_bias=((0, 50 * bound),))
