"""An open loop: requests arrive at a rate, whether or not earlier ones have ended."""

import json
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """The distribution of the lengths of prompts or answers in tokens: log-normal around a median, clipped."""

    median: int
    sigma: float
    minimum: int
    maximum: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """Draws `count` lengths."""
        drawn = self.median * np.exp(self.sigma * generator.standard_normal(count))
        lengths: list[int] = np.clip(drawn.round(), self.minimum, self.maximum).astype(int).tolist()
        return lengths


@dataclass(frozen=True)
class Arrival:
    """A request that is due `at_s` seconds after the start, and for which exactly `output_tokens` are generated."""

    at_s: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Schedule:
    """Arrivals in order. A request that takes longer than `limit_s` is cancelled."""

    arrivals: tuple[Arrival, ...]
    limit_s: float

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Schedule":
        """The inverse of `to_json`."""
        values = json.loads(line)
        arrivals = (Arrival(each["at_s"], tuple(each["prompt"]), each["output_tokens"]) for each in values["arrivals"])
        return cls(tuple(arrivals), values["limit_s"])


@dataclass(frozen=True)
class Traffic:
    """The values that all rates share. Prompts are random tokens below `vocabulary_size`."""

    prompt: Lengths
    output: Lengths
    limit_s: float
    vocabulary_size: int
    seed: int

    def poisson(self, rate_per_s: float, duration_s: float) -> Schedule:
        """Draws the arrivals of a Poisson process with exactly this rate: the gaps are exponential, scaled to fill the
        duration (Devroye 1986, section V.2.2).

        The same seed gives the same schedule, and the same lengths in the same order at every rate. Prompts differ
        between rates, so that no cache can help.
        """
        count = max(1, round(rate_per_s * duration_s))
        gaps, prompts, outputs = (np.random.default_rng([self.seed, stream]) for stream in range(3))
        elapsed = np.cumsum(gaps.exponential(size=count + 1))
        at_s = duration_s * elapsed[:-1] / elapsed[-1]
        tokens = np.random.default_rng([self.seed, 3, round(1000 * rate_per_s)])
        return Schedule(
            tuple(
                # The last token of the vocabulary is the end token.
                Arrival(at, tuple(tokens.integers(self.vocabulary_size - 1, size=length).tolist()), output_tokens)
                for at, length, output_tokens in zip(
                    at_s.tolist(), self.prompt.draw(prompts, count), self.output.draw(outputs, count), strict=True
                )
            ),
            self.limit_s,
        )
