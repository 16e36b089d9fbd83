"""Drawing the next token from logits, in NumPy: exact, and the same on every backend.

A draw depends on the logits, the parameters and the number that `uniform(seed, position)` gives, and on nothing else.
Shapes: V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidArgument

Logits = NDArray[np.float32]

_MASK = (1 << 64) - 1
# So many of the likeliest tokens hold the top-p mass in nearly every case, and finding them needs no full sort.
_TOP_P_GUESS = 256
# Tokens whose weights are summed first, to find the block that a number falls into.
_DRAW_BLOCK = 256
# The lowest temperature at which logits can be scaled in fp32 and stay finite as far as they matter.
_FP32_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is drawn. Raises `InvalidArgument`, naming the field, on a value out of range."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0):
            raise InvalidArgument(f"temperature is {self.temperature:g}, but must be from 0 to 100.")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k is {self.top_k}, but must be 0 (all tokens) or more.")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidArgument(f"top_p is {self.top_p:g}, but must be above 0 and at most 1.")
        if not 0.0 <= self.min_p <= 1.0:
            raise InvalidArgument(f"min_p is {self.min_p:g}, but must be from 0 to 1.")
        if not (math.isfinite(self.repetition_penalty) and 0.0 < self.repetition_penalty <= 100.0):
            raise InvalidArgument(
                f"repetition_penalty is {self.repetition_penalty:g}, but must be above 0 and at most 100."
            )


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the draw at a position, by two rounds of SplitMix64 (Steele et al. 2014)."""
    bits = _split_mix(_split_mix(seed & _MASK) ^ (position & _MASK))
    return (bits >> 11) * 2.0**-53


def penalise_repetition(logits: Logits, seen: NDArray[np.int32], penalty: float) -> Logits:
    """A copy of (V,) logits with those of seen tokens made less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    penalised = logits.copy()
    values = penalised[seen]
    penalised[seen] = np.where(values > 0, values / penalty, values * penalty)
    return penalised


def distribution(logits: Logits, parameters: SamplingParameters) -> NDArray[np.float64]:
    """The probabilities (V,) that a draw follows: temperature first, then top-k, top-p and min-p, each on what is left.

    Temperature 0 is the likeliest token with certainty. A logit of minus infinity has probability 0.
    Sources: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p).
    """
    if parameters.temperature == 0.0:
        probabilities = np.zeros(logits.shape, np.float64)
        probabilities[np.argmax(logits)] = 1.0
        return probabilities
    scaled = (logits.astype(np.float64) - logits.max()) / parameters.temperature
    probabilities = np.exp(scaled)
    if 0 < parameters.top_k < probabilities.size:
        kept = np.argpartition(probabilities, -parameters.top_k)[-parameters.top_k :]
        probabilities = _only(probabilities, kept)
    if parameters.top_p < 1.0:
        probabilities = _only(probabilities, _nucleus(probabilities, parameters.top_p))
    if parameters.min_p > 0.0:
        probabilities[probabilities < parameters.min_p * probabilities.max()] = 0.0
    normalised: NDArray[np.float64] = probabilities / probabilities.sum()
    return normalised


def draw(weights: NDArray[np.floating[Any]], number: float) -> int:
    """The token at which the cumulated weights (V,), as of probabilities, pass a number in [0, 1) of their sum."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _DRAW_BLOCK)), dtype=np.float64)
    target = number * sums[-1]
    # Here and below, rounding can bring the target up to the sum itself, which no token passes.
    index = min(int(np.searchsorted(sums, target, side="right")), int(np.searchsorted(sums, sums[-1])))
    start = index * _DRAW_BLOCK
    block = weights[start : start + _DRAW_BLOCK]
    cumulated = np.cumsum(block, dtype=np.float64)
    before = sums[index - 1] if index else 0.0
    within = int(np.searchsorted(cumulated, target - before, side="right"))
    return start + min(within, int(np.flatnonzero(block)[-1]))


def sample(logits: Logits, parameters: SamplingParameters, seed: int, position: int) -> int:
    """One token drawn from (V,) logits."""
    if parameters.temperature == 0.0:
        return int(np.argmax(logits))
    number = uniform(seed, position)
    filtered = parameters.top_k > 0 or parameters.top_p < 1.0 or parameters.min_p > 0.0
    if filtered or parameters.temperature < _FP32_TEMPERATURE:
        return draw(distribution(logits, parameters), number)
    # Nothing is to be compared, so fp32 is exact enough, and several times faster. What overflows has weight 0.
    with np.errstate(over="ignore"):
        weights = logits - logits.max()
        weights *= np.float32(1 / parameters.temperature)
    np.exp(weights, out=weights)
    return draw(weights, number)


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms (V,) of the model's own distribution."""
    shifted = logits.astype(np.float64) - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _only(probabilities: NDArray[np.float64], kept: NDArray[np.intp]) -> NDArray[np.float64]:
    result = np.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest likeliest tokens that together reach `top_p` of the mass."""
    mass = top_p * probabilities.sum()
    likely = np.argpartition(probabilities, -min(_TOP_P_GUESS, probabilities.size))[-_TOP_P_GUESS:]
    if probabilities[likely].sum() < mass:
        likely = np.arange(probabilities.size)
    order = likely[np.argsort(-probabilities[likely], kind="stable")]
    count = int(np.searchsorted(np.cumsum(probabilities[order]), mass)) + 1
    return order[:count]


def _split_mix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
