"""Confidence intervals of the level `LEVEL`. Loads no model framework.

Losses are ratios of sums over units, which are documents or passages: U units with `nats` and `tokens` each, (U,). The
tokens of one document depend on each other, so whole units are resampled, with replacement.
Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", sections 6.2 and 13.3 (percentile intervals).
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer_service.evaluation.record import LEVEL, Interval

# Of fewer units, all may lie on one side by chance.
FEWEST_UNITS = 10
_RESAMPLES = 2000
_SEED = 20_240_229
# Adjacent units are added up until there are at most this many, so that the time is limited.
_MOST_UNITS = 32_768
# The most units that are drawn at a time, in all resamples together: 20 MiB.
_DRAWN = 1 << 20
_TAIL = (1 - LEVEL) / 2

Values = NDArray[np.float64]


def ratio_interval(nats: ArrayLike, tokens: ArrayLike) -> Interval | None:
    """Returns the interval of sum(nats) / sum(tokens), or None for fewer than `FEWEST_UNITS` units."""
    return _percentiles(_ratios(nats, tokens))


def paired_interval(nats_a: ArrayLike, nats_b: ArrayLike, tokens: ArrayLike) -> Interval | None:
    """Returns the interval of (sum(nats_b) - sum(nats_a)) / sum(tokens) on the same units, or None for a single one.

    The difference is taken within each unit, so that what makes a unit hard for both does not widen the interval.
    """
    return _percentiles(_ratios(_values(nats_b) - _values(nats_a), tokens))


def unpaired_interval(
    nats_a: ArrayLike, tokens_a: ArrayLike, nats_b: ArrayLike, tokens_b: ArrayLike
) -> Interval | None:
    """Returns the interval of sum(nats_b) / sum(tokens_b) - sum(nats_a) / sum(tokens_a) on different units, or None if
    either has a single one."""
    a, b = _ratios(nats_a, tokens_a), _ratios(nats_b, tokens_b, stream=1)
    return None if a is None or b is None else _percentiles(b - a)


def wilson_interval(successes: int, trials: int) -> Interval:
    """Returns the score interval of a probability (Wilson 1927), which stays within 0 and 1."""
    z = NormalDist().inv_cdf(1 - _TAIL)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2) / (1 + weight)
    half = z * ((share * (1 - share) + weight / 4) / trials) ** 0.5 / (1 + weight)
    return Interval(max(centre - half, 0.0), min(centre + half, 1.0))


def _ratios(nats: ArrayLike, tokens: ArrayLike, stream: int = 0) -> Values | None:
    """Returns the ratio of each resample, (R,); different streams draw independently."""
    over, under = _grouped(_values(nats)), _grouped(_values(tokens))
    units = over.size
    assert under.size == units > 0
    if units < FEWEST_UNITS:
        return None
    generator = np.random.Generator(np.random.Philox(key=[_SEED, stream]))
    rows = max(_DRAWN // units, 1)
    ratios = []
    for start in range(0, _RESAMPLES, rows):
        drawn = generator.integers(0, units, (min(rows, _RESAMPLES - start), units), dtype=np.int32)
        ratios.append(over[drawn].sum(axis=1) / under[drawn].sum(axis=1))
    return np.concatenate(ratios)


def _grouped(values: Values) -> Values:
    """Adds up adjacent units of (U,), if there are more than `_MOST_UNITS`."""
    together = -(-values.size // _MOST_UNITS)
    return values if together == 1 else np.add.reduceat(values, np.arange(0, values.size, together))


def _values(values: ArrayLike) -> Values:
    return np.asarray(values, dtype=np.float64)


def _percentiles(ratios: Values | None) -> Interval | None:
    if ratios is None:
        return None
    low, high = np.quantile(ratios, [_TAIL, 1 - _TAIL])
    return Interval(float(low), float(high))
