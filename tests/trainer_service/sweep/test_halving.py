"""What halving promises, checked by playing whole sweeps with any losses, failures, orders and kills."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument
from trainer_service.sweep.halving import Candidate, Halving, Standing

SHARES = st.sampled_from([Fraction(1, 3), Fraction(1, 2), Fraction(2, 3), Fraction(1, 4)])
# The loss of a candidate at each rung, None where it fails before.
LOSSES = st.lists(st.none() | st.integers(0, 5).map(float), min_size=4, max_size=4)


def expected(halving: Halving, losses: Sequence[Sequence[float | None]]) -> dict[int, int]:
    """Returns the last step of each candidate, by the rule as a person would write it."""
    ends, left = {}, list(range(len(losses)))
    for rung, step in enumerate(halving.steps):
        ends.update(dict.fromkeys(left, step))
        alive = [each for each in left if losses[each][rung] is not None]
        if rung + 1 < len(halving.steps):
            left = sorted(alive, key=lambda each: (losses[each][rung], each))[: halving.sizes[rung + 1]]
    return {number + 1: step for number, step in ends.items()}


class Play:
    """A sweep whose candidates come to their rungs in any order, and whose caller is killed at any moment."""

    def __init__(self, halving: Halving, losses: Sequence[Sequence[float | None]]) -> None:
        self.halving = halving
        self._losses = losses
        self.candidates = [Candidate(n + 1, halving.first, Standing.TRAINS) for n in range(len(losses))]
        self.steps = {each.number: each.until for each in self.candidates}

    def train(self, place: int) -> None:
        """Lets one of the candidates that train come to its rung, or fail on its way there."""
        each = [each for each in self.candidates if each.standing is Standing.TRAINS][place]
        # It also passes rungs at which nothing is decided, and may fail there.
        passed = self._losses[each.number - 1][: self.halving.steps.index(each.until) + 1]
        loss = None if None in passed else passed[-1]
        is_last = each.until == self.halving.steps[-1]
        standing = Standing.ENDED if is_last or loss is None else Standing.WAITS
        self._put(replace(each, standing=standing, loss=loss))

    def act(self, chance: Random, most: int) -> None:
        """Carries out what is due, or only the first parts of it, as if the caller was killed then."""
        decision = self.halving.decide(self.candidates)
        waiting = {each.number: each for each in self.candidates if each.standing is Standing.WAITS}
        named = [*decision.go_on, *decision.stop]
        assert len(named) == len(set(named)) and set(named) <= set(waiting)
        if named:
            trains = [each for each in self.candidates if each.standing is Standing.TRAINS]
            assert not any(each.until == waiting[number].until for each in trains for number in named)
        for number in chance.sample(named, min(most, len(named))):
            if number in decision.stop:
                self._put(replace(waiting[number], standing=Standing.ENDED))
                continue
            assert decision.until > waiting[number].until
            self._put(Candidate(number, decision.until, Standing.TRAINS))
            self.steps[number] = decision.until

    def _put(self, candidate: Candidate) -> None:
        self.candidates[candidate.number - 1] = candidate
        self.halving.require_possible(self.candidates)

    @property
    def training(self) -> int:
        return sum(each.standing is Standing.TRAINS for each in self.candidates)

    @property
    def is_over(self) -> bool:
        return all(each.standing is Standing.ENDED for each in self.candidates)


@given(st.randoms(use_true_random=False), st.lists(LOSSES, min_size=2, max_size=9), SHARES)
def test_any_order_and_any_kills_lead_to_the_same_candidates(
    chance: Random, losses: list[list[float | None]], keep: Fraction
) -> None:
    halving = Halving.of(len(losses), 640, 10, 4, keep)
    play = Play(halving, losses)
    while not play.is_over:
        if play.training and chance.random() < 0.5:
            play.train(chance.randrange(play.training))
        else:
            play.act(chance, chance.choice([0, 1, 2, 100]))
    assert not halving.decide(play.candidates).is_due
    assert play.steps == _merged(halving, expected(halving, losses))


def _merged(halving: Halving, ends: dict[int, int]) -> dict[int, int]:
    """Replaces rungs at which nothing is decided by the next one: the candidates there pass it without a stop."""
    following = {halving.first}
    for rung in range(len(halving.steps) - 1):
        following.add(halving._after(rung))
    return {number: min(each for each in following if each >= step) for number, step in ends.items()}


def test_a_third_of_the_candidates_goes_on_from_each_rung_which_lie_three_times_further() -> None:
    halving = Halving.of(9, 900, 10, 3, Fraction(1, 3))
    assert (halving.steps, halving.sizes) == ((100, 300, 900), (9, 3, 1))
    assert (halving.first, halving.most_steps) == (100, 9 * 100 + 3 * 200 + 600)


@pytest.mark.parametrize(
    ("candidates", "keep", "sizes"), [(4, Fraction(1, 3), (4, 2, 1)), (10, Fraction(1, 4), (10, 3, 1))]
)
def test_the_share_that_goes_on_is_rounded_up(candidates: int, keep: Fraction, sizes: tuple[int, ...]) -> None:
    assert Halving.of(candidates, 900, 10, 3, keep).sizes == sizes


def test_rungs_are_at_steps_that_are_evaluated() -> None:
    assert Halving.of(6, 400, 80, 3, Fraction(1, 3)).steps == (80, 160, 400)
    assert Halving.of(6, 90, 250, 1, Fraction(1, 3)).steps == (90,)


@pytest.mark.parametrize(("max_steps", "interval", "rungs"), [(400, 250, 3), (400, 500, 2), (10, 1, 5)])
def test_rungs_that_would_be_at_one_step_are_refused(max_steps: int, interval: int, rungs: int) -> None:
    with pytest.raises(InvalidArgument, match=f"multiple of evaluation_interval, {interval}"):
        Halving.of(6, max_steps, interval, rungs, Fraction(1, 3))


def test_one_candidate_that_is_left_passes_the_rungs_at_which_nothing_is_decided() -> None:
    halving = Halving.of(2, 800, 10, 4, Fraction(1, 2))
    waiting = [Candidate(n, 100, Standing.WAITS, loss) for n, loss in ((1, 3.0), (2, 2.0))]
    decision = halving.decide(waiting)
    assert (decision.until, decision.go_on, decision.stop) == (800, (2,), (1,))


def test_a_loss_that_is_absent_counts_as_the_worst() -> None:
    halving = Halving.of(3, 900, 10, 3, Fraction(1, 3))
    waiting = [Candidate(1, 100, Standing.WAITS, None), Candidate(2, 100, Standing.WAITS, math.inf)]
    decision = halving.decide([*waiting, Candidate(3, 100, Standing.WAITS, 9.0)])
    assert (decision.go_on, decision.stop) == ((3,), (1, 2))


def test_candidates_of_a_sweep_with_other_rungs_are_refused() -> None:
    halving = Halving.of(9, 900, 10, 3, Fraction(1, 3))
    with pytest.raises(
        InvalidArgument, match="Candidate 4 trains to step 200, but this command has rungs at the steps"
    ):
        halving.require_possible([Candidate(4, 200, Standing.TRAINS)])
    with pytest.raises(
        InvalidArgument, match="4 candidates have gone on to step 300, but by this command 3 would have"
    ):
        halving.require_possible([Candidate(n, 300, Standing.TRAINS) for n in range(1, 5)])
