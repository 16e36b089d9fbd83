from dataclasses import replace

import numpy as np
import pytest

from tests.benchmarks.schedule import Lengths, Schedule, Traffic

LENGTHS = Lengths(median=20, sigma=0.6, minimum=4, maximum=64)
TRAFFIC = Traffic(prompt=LENGTHS, output=replace(LENGTHS, median=10), limit_s=30.0, vocabulary_size=100, seed=1)


def test_the_same_seed_gives_the_same_schedule() -> None:
    schedule = TRAFFIC.poisson(5.0, 10.0)
    assert schedule == TRAFFIC.poisson(5.0, 10.0)
    assert schedule == Schedule.from_json(schedule.to_json())
    assert schedule != replace(TRAFFIC, seed=2).poisson(5.0, 10.0)


def test_arrivals_have_the_rate_and_the_gaps_of_a_poisson_process() -> None:
    at_s = [arrival.at_s for arrival in TRAFFIC.poisson(50.0, 100.0).arrivals]
    assert len(at_s) == 5000
    assert at_s == sorted(at_s)
    assert at_s[0] > 0
    assert at_s[-1] < 100.0
    gaps_s = np.diff(at_s)
    # In an exponential distribution the standard deviation equals the mean, and one gap in e is longer than the mean.
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.1)
    assert (gaps_s > gaps_s.mean()).mean() == pytest.approx(np.exp(-1), abs=0.03)


def test_lengths_have_the_given_median_and_bounds() -> None:
    arrivals = TRAFFIC.poisson(50.0, 100.0).arrivals
    prompts, outputs = [len(each.prompt) for each in arrivals], [each.output_tokens for each in arrivals]
    for lengths, median in ((prompts, 20), (outputs, 10)):
        assert np.median(lengths) == pytest.approx(median, rel=0.1)
        assert min(lengths) >= 4
        assert max(lengths) <= 64


def test_all_rates_have_the_same_lengths_and_different_prompts() -> None:
    slow, fast = TRAFFIC.poisson(2.0, 10.0).arrivals, TRAFFIC.poisson(20.0, 10.0).arrivals
    for one, other in zip(slow, fast, strict=False):
        assert (len(one.prompt), one.output_tokens) == (len(other.prompt), other.output_tokens)
        assert one.prompt != other.prompt


def test_no_prompt_contains_the_end_token() -> None:
    tokens = {token for arrival in TRAFFIC.poisson(50.0, 100.0).arrivals for token in arrival.prompt}
    assert tokens == set(range(99))
