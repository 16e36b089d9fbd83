"""Draws the next token from logits in NumPy: exactly, and in the same way on every backend.

A draw depends only on the logits, the parameters and the number `uniform(seed, position)`.
Shapes: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import InvalidArgument

Logits = NDArray[np.float32]

MAX_BIASES = 300
_RANGES = {"temperature": (0, 100), "min_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
_MOST_ABOVE_0 = {"top_p": 1, "repetition_penalty": 100}

_MASK = (1 << 64) - 1
# This many of the likeliest tokens nearly always hold the top-p mass, and finding them needs no full sort.
_TOP_P_GUESSES = (256, 4096)
# A draw first finds its block of this many tokens, by the sums of their weights.
_DRAW_BLOCK = 256
_HIGHEST_LOGIT = float(np.finfo(np.float32).max)
# The lowest temperature at which scaled logits that matter stay finite in fp32.
_FP32_TEMPERATURE = 1e-3
_HIGHEST_INVERSE = 1e30


@dataclass(frozen=True)
class SamplingParameters:
    """How a token is drawn. Raises `InvalidArgument` with the name of the field if a value is out of range."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Pairs of a token and the number that is added to its logit.
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise InvalidArgument(f"{name} is {value:g}, but must be from {least} to {most}.")
        for name, most in _MOST_ABOVE_0.items():
            if not 0 < (value := getattr(self, name)) <= most:
                raise InvalidArgument(f"{name} is {value:g}, but must be above 0 and at most {most}.")
        if self.top_k < 0:
            raise InvalidArgument(f"top_k is {self.top_k}, but must be 0 (all tokens) or more.")
        check_biases(len(self.logit_bias))
        for token, bias in self.logit_bias:
            if not -100.0 <= bias <= 100.0:
                raise InvalidArgument(f"logit_bias of token {token} is {bias:g}, but must be from -100 to 100.")


def check_biases(count: int) -> None:
    """Raises `InvalidArgument` if more than `MAX_BIASES` tokens have a bias."""
    if count > MAX_BIASES:
        raise InvalidArgument(f"logit_bias has {count} tokens, but may have at most {MAX_BIASES}.")


def uniform(seed: int, position: int) -> float:
    """Returns the number in [0, 1) that decides a draw, by two rounds of SplitMix64 (Steele et al. 2014)."""
    bits = _split_mix(_split_mix(seed & _MASK) ^ (position & _MASK))
    return (bits >> 11) * 2.0**-53


def to_bits(numbers: Sequence[int]) -> NDArray[np.uint64]:
    """Returns the lowest 64 bits of numbers, (N,), for `uniforms`."""
    return np.array([number & _MASK for number in numbers], np.uint64)


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns `uniform` of each pair."""
    bits = _split_mix_all(_split_mix_all(seeds) ^ positions)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def adjust(
    logits: Logits, parameters: SamplingParameters, prompt: Sequence[int], generated: Mapping[int, int]
) -> Logits:
    """Returns (V,) logits after penalties and bias, a copy if anything changes; `generated` counts the drawn tokens.

    Repetition first (Keskar et al. 2019, CTRL, section 4.1), over prompt and generated tokens; then presence and
    frequency over generated ones, and the bias, as OpenAI's API defines them.
    """
    if parameters.repetition_penalty != 1.0:
        seen = np.array([*prompt, *generated], np.intp)
        values, penalty = logits[seen].astype(np.float64), parameters.repetition_penalty
        # A tiny penalty would make a logit infinite, and no token could be drawn.
        with np.errstate(over="ignore"):
            penalised = np.where(values > 0, values / penalty, values * penalty).clip(-_HIGHEST_LOGIT, _HIGHEST_LOGIT)
        logits = logits.copy()
        logits[seen] = penalised
    if generated and (parameters.presence_penalty or parameters.frequency_penalty):
        tokens = np.fromiter(generated.keys(), np.intp)
        counts = np.fromiter(generated.values(), np.float32)
        logits = logits.copy()
        logits[tokens] -= np.float32(parameters.presence_penalty) + np.float32(parameters.frequency_penalty) * counts
    if parameters.logit_bias:
        logits = logits.copy()
        for token, bias in parameters.logit_bias:
            logits[token] += np.float32(bias)
    return logits


def candidates(
    logits: Logits, parameters: SamplingParameters
) -> tuple[NDArray[np.intp] | None, NDArray[np.floating[Any]]]:
    """Returns the tokens that can be drawn at a temperature above 0, ascending (None: all), and their weights.

    Temperature first, then top-k, top-p and min-p, each on the tokens that are left; of equal logits the first counts.
    A logit of minus infinity has weight 0. Sources: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p).
    """
    tokens: NDArray[np.intp] | None = None
    highest = logits.max()
    if 0 < parameters.top_k < logits.size:
        tokens = _first_above(logits, np.partition(logits, -parameters.top_k)[-parameters.top_k], parameters.top_k)
        logits = logits[tokens]
    weights = _weights(logits, highest, parameters.temperature)
    if parameters.top_p < 1.0:
        kept = _nucleus(weights, parameters.top_p)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    if parameters.min_p > 0.0:
        kept = np.flatnonzero(weights >= parameters.min_p)
        tokens, weights = kept if tokens is None else tokens[kept], weights[kept]
    return tokens, weights


def draw(weights: NDArray[np.floating[Any]], number: float) -> int:
    """Returns the token at which the cumulated weights (V,) pass a share in [0, 1) of their sum."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, weights.size, _DRAW_BLOCK)), dtype=np.float64)
    target = number * sums[-1]
    # Here and below, rounding can raise the target to the sum itself, which no token passes.
    index = min(int(np.searchsorted(sums, target, side="right")), int(np.searchsorted(sums, sums[-1])))
    start = index * _DRAW_BLOCK
    block = weights[start : start + _DRAW_BLOCK]
    cumulated = np.cumsum(block, dtype=np.float64)
    before = sums[index - 1] if index else 0.0
    within = int(np.searchsorted(cumulated, target - before, side="right"))
    return start + min(within, int(np.flatnonzero(block)[-1]))


def sample(logits: Logits, parameters: SamplingParameters, seed: int, position: int) -> int:
    """Draws one token from (V,) logits."""
    if parameters.temperature == 0.0:
        return int(np.argmax(logits))
    tokens, weights = candidates(logits, parameters)
    drawn = draw(weights, uniform(seed, position))
    return drawn if tokens is None else int(tokens[drawn])


def is_finite(logits: Logits) -> bool:
    """Whether all (V,) logits are finite."""
    # Both are NaN if any logit is.
    return bool(np.isfinite(logits.max()) and np.isfinite(logits.min()))


def inverse_temperature(temperature: float) -> float:
    """Returns 1 / temperature, finite in fp32 at the lowest temperatures; 0 for the likeliest token."""
    return min(1 / temperature, _HIGHEST_INVERSE) if temperature else 0.0


@dataclass(frozen=True)
class TemperatureSampling:
    """A draw that needs only a temperature, from logits that a decoder returned; `masked` is not drawn."""

    logits: Any
    temperature: float
    seed: int
    position: int
    masked: int | None

    @property
    def inverse_temperature(self) -> float:
        """1 / temperature, limited as by the function."""
        return inverse_temperature(self.temperature)


def log_probabilities(logits: Logits) -> NDArray[np.float64]:
    """Returns the natural logarithms (V,) of the model's own distribution."""
    shifted = logits.astype(np.float64) - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _weights(logits: Logits, highest: np.float32, temperature: float) -> NDArray[np.floating[Any]]:
    """Returns the ratio of each token's probability to that of the likeliest token."""
    # An overflow gives the weight 0.
    with np.errstate(over="ignore"):
        if temperature < _FP32_TEMPERATURE:
            precise: NDArray[np.float64] = np.exp((logits.astype(np.float64) - highest) / temperature)
            return precise
        weights = logits - highest
        weights *= np.float32(1 / temperature)
    np.exp(weights, out=weights)
    return weights


def _nucleus(weights: NDArray[np.floating[Any]], top_p: float) -> NDArray[np.intp]:
    """Returns the smallest set of likeliest tokens that reaches `top_p` of the mass, ascending."""
    mass = top_p * weights.sum(dtype=np.float64)
    for guess in (*_TOP_P_GUESSES, weights.size):
        count = min(guess, weights.size)
        likeliest = np.sort(np.partition(weights, -count)[-count:])[::-1]
        sums = np.cumsum(likeliest, dtype=np.float64)
        if sums[-1] >= mass:
            break
    needed = min(int(np.searchsorted(sums, mass)) + 1, sums.size)
    return _first_above(weights, likeliest[needed - 1], needed)


def _first_above(values: NDArray[np.floating[Any]], lowest: np.floating[Any], count: int) -> NDArray[np.intp]:
    """Returns the indices of the `count` highest values, ascending; of values equal to `lowest`, the first ones."""
    above = np.flatnonzero(values > lowest)
    equal = np.flatnonzero(values == lowest)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def _split_mix_all(states: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = states + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _split_mix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
