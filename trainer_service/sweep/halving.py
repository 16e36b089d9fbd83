"""Synchronous successive halving: which candidates of a sweep go on, and which stop. Pure.

Sources: Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", section 2;
Li et al. 2018, "Hyperband", the inner loop of algorithm 1. The share that goes on is rounded up, so that small grids do
not lose all but one candidate at their first rung.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from shared.errors import InvalidArgument


class Standing(Enum):
    """Where a candidate is: before its next rung, waiting at it, or at its end."""

    TRAINS = "trains"
    WAITS = "waits"
    ENDED = "ended"


@dataclass(frozen=True)
class Candidate:
    """A candidate: its number, the step to which it may train, and its held-out loss at this step once it waits there.

    A candidate that has ended trains no more: it is at the end of its schedule, was stopped, has failed or was
    cancelled.
    """

    number: int
    until: int
    standing: Standing
    loss: float | None = None


@dataclass(frozen=True)
class Decision:
    """The candidates that train on to the step `until`, the best one first, and those that stop."""

    until: int = 0
    go_on: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()

    @property
    def is_due(self) -> bool:
        """Whether there is something to do."""
        return bool(self.go_on or self.stop)


@dataclass(frozen=True)
class Halving:
    """The rungs of a sweep: `steps` in ascending order, the last one the end of the schedule, and at each of them how
    many candidates are left, in `sizes`.

    `decide` promises, for any order in which candidates come to a rung, and for a caller that carries a decision out in
    any order, is killed at any moment, and asks again:

    - Nobody goes on or stops before each candidate of the rung waits at it or has ended.
    - The candidates of a rung are at most its size, and those with the lowest losses at the rung before, of equal ones
      those with the lowest numbers. One that has ended before its rung counts as worse than any other.
    - Only a candidate that waits is named, and none twice. When all have ended, nothing is left to decide.
    """

    steps: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, candidates: int, max_steps: int, interval: int, rungs: int, keep: Fraction) -> "Halving":
        """Returns rungs at multiples of `interval` whose steps grow by 1 / keep; the share `keep` is left at the next.

        Raises `InvalidArgument` if two rungs would be at the same step.
        """
        ends = [max_steps * keep ** (rungs - 1 - rung) for rung in range(rungs - 1)]
        steps = (*(interval * max(1, round(end / interval)) for end in ends), max_steps)
        if list(steps) != sorted(set(steps)):
            raise InvalidArgument(
                f"{rungs} rungs do not fit: their steps would be {', '.join(map(str, steps))}, because each is a "
                f"multiple of evaluation_interval, {interval}. Set a smaller evaluation_interval, more max_steps or "
                "fewer --rungs."
            )
        sizes = [candidates]
        while len(sizes) < rungs:
            sizes.append(math.ceil(sizes[-1] * keep))
        return cls(steps, tuple(sizes))

    @property
    def first(self) -> int:
        """The step to which every candidate trains at first."""
        return self._after(-1)

    @property
    def most_steps(self) -> int:
        """The steps of all candidates together if none of them ends early by itself."""
        before = (0, *self.steps)
        return sum(size * (step - earlier) for size, step, earlier in zip(self.sizes, self.steps, before, strict=False))

    def _after(self, rung: int) -> int:
        """Returns the step of the next rung at which something is decided, or else the end of the schedule."""
        for later in range(rung + 1, len(self.steps) - 1):
            if self.sizes[later + 1] < self.sizes[later]:
                return self.steps[later]
        return self.steps[-1]

    def decide(self, candidates: Sequence[Candidate]) -> Decision:
        """Returns what is due now, if anything is."""
        for rung, step in enumerate(self.steps[:-1]):
            here = [each for each in candidates if each.until == step and each.standing is not Standing.ENDED]
            if any(each.standing is Standing.TRAINS for each in here):
                break
            if here:
                # A caller that was killed has let some of them go on before.
                room = self.sizes[rung + 1] - sum(each.until > step for each in candidates)
                ranked = [each.number for each in sorted(here, key=_rank)]
                go_on, stop = ranked[: max(room, 0)], ranked[max(room, 0) :]
                return Decision(self._after(rung), tuple(go_on), tuple(stop))
        return Decision()

    def require_possible(self, candidates: Sequence[Candidate]) -> None:
        """Raises `InvalidArgument` if a sweep with these rungs cannot have come to where the candidates are."""
        began = "give --rungs and --keep with which the sweep began, or another --name."
        for each in candidates:
            if each.until not in self.steps:
                steps = ", ".join(map(str, self.steps))
                raise InvalidArgument(
                    f"Candidate {each.number} trains to step {each.until}, but this command has rungs at the steps "
                    f"{steps}: {began}"
                )
        for step, size in zip(self.steps, self.sizes, strict=True):
            if (count := sum(each.until >= step for each in candidates)) > size:
                raise InvalidArgument(
                    f"{count} candidates have gone on to step {step}, but by this command {size} would have: {began}"
                )


def _rank(candidate: Candidate) -> tuple[float, int]:
    return math.inf if candidate.loss is None else candidate.loss, candidate.number
