"""What opinions of scripted judges say about two versions."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FailedPrecondition
from tests.trainer_service.evaluation.records import METHOD, bare, full
from trainer_service.evaluation.judged import (
    CUT_OFF,
    Opinion,
    Opinions,
    Pair,
    Question,
    Winner,
    frozen_pairs,
    pairs_of,
    questions,
    weigh,
)
from trainer_service.evaluation.record import Continuation, Grades, Judged, Record, Verdict

RIVAL = bare(3).version
GOOD, BAD = Grades(9, 8, 7), Grades(2, 3, 4)

Judge = Callable[[Question], Winner]


def longer(question: Question) -> Winner:
    if len(question.a) == len(question.b):
        return Winner.TIE
    return Winner.A if len(question.a) > len(question.b) else Winner.B


def right(question: Question) -> Winner:
    """Judges frozen pairs right, and prefers the longer one of other texts."""
    return next((each.right for each in frozen_pairs() if each.question == question), longer(question))


def opinions(judge: Judge, pairs: Sequence[Pair]) -> dict[Question, Opinion]:
    found = {}
    for question in questions(pairs, frozen_pairs()):
        winner = judge(question)
        grades = (GOOD, BAD) if winner is Winner.A else (BAD, GOOD)
        found[question] = Opinion(winner, *grades)
    return found


def judged(judge: Judge, pairs: Sequence[Pair]) -> Judged:
    return weigh(RIVAL, pairs, frozen_pairs(), opinions(judge, pairs))


def pairs(won: int, tied: int, lost: int, seeds: int = 2) -> list[Pair]:
    """Returns pairs after as many beginnings, of whose texts the longer one is ours, neither, or theirs."""
    texts = [("a long story", "short")] * won + [("one text", "two text")] * tied + [("short", "a long story")] * lost
    return [
        Pair(f"beginning {at}", f"{ours} {seed}", f"{theirs} {seed}")
        for at, (ours, theirs) in enumerate(texts)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize(
    ("won", "tied", "lost", "win_rate", "verdict"),
    [
        (12, 0, 0, 1.0, Verdict.BETTER),
        (12, 4, 0, 0.875, Verdict.BETTER),
        (0, 4, 12, 0.125, Verdict.WORSE),
        (8, 0, 8, 0.5, Verdict.UNKNOWN),
        (0, 12, 0, 0.5, Verdict.UNKNOWN),
    ],
)
def test_a_fair_judge_gives_the_share_of_pairs_that_the_version_wins(
    won: int, tied: int, lost: int, win_rate: float, verdict: Verdict
) -> None:
    found = judged(right, pairs(won, tied, lost))
    assert found.win_rate == pytest.approx(win_rate)
    assert found.interval is not None and found.interval.low <= win_rate <= found.interval.high
    assert (found.agreement, found.calibration, found.verdict, found.no_verdict) == (1.0, 1.0, verdict, "")
    assert found.prompts == won + tied + lost and found.judged == found.pairs == 2 * found.prompts


def test_a_judge_who_always_prefers_the_first_text_agrees_with_itself_about_nothing() -> None:
    found = judged(lambda question: right(question) if question in frozen_questions() else Winner.A, pairs(14, 0, 0))
    assert (found.agreement, found.win_rate, found.verdict) == (0.0, 0.5, None)
    assert found.no_verdict == ("The judge said the same in both orders about 0.0% of the pairs; a verdict needs 60%.")


def frozen_questions() -> set[Question]:
    return {each.question for each in frozen_pairs()}


@pytest.mark.parametrize("place", [Winner.A, Winner.B, Winner.TIE])
def test_a_judge_with_one_answer_for_everything_fails_at_the_frozen_pairs(place: Winner) -> None:
    found = judged(lambda _: place, pairs(14, 0, 0))
    assert found.verdict is None and "pairs whose better text is known" in found.no_verdict
    assert found.calibration <= 0.6


def test_a_judge_who_guesses_gets_no_verdict() -> None:
    drawn = random.Random(7)
    found = judged(lambda _: drawn.choice(list(Winner)), pairs(16, 0, 0))
    assert found.verdict is None and found.calibration < 0.8


def test_agreement_decides_at_six_tenths() -> None:
    asked = pairs(10, 0, 0, seeds=1)

    def contradicts(times: int) -> Judge:
        confused = {pair.questions[1] for pair in asked[:times]}
        return lambda question: Winner.A if question in confused else right(question)

    assert judged(contradicts(4), asked).agreement == pytest.approx(0.6)
    assert judged(contradicts(4), asked).verdict is not None
    assert judged(contradicts(5), asked).verdict is None


def test_calibration_decides_at_eight_tenths() -> None:
    asked = pairs(12, 0, 0)

    def errs(times: int) -> Judge:
        wrong = {each.question for each in frozen_pairs()[:times]}
        return lambda question: Winner.TIE if question in wrong else right(question)

    assert judged(errs(4), asked).verdict is Verdict.BETTER  # 17 of 21
    assert judged(errs(5), asked).verdict is None
    assert judged(errs(5), asked).calibration == pytest.approx(16 / 21)


def test_a_question_without_an_opinion_takes_its_pair_out_and_is_never_guessed() -> None:
    asked = pairs(10, 0, 10, seeds=1)
    found = opinions(right, asked)
    for at in range(4):
        del found[asked[at].questions[at % 2]]
    weighed = weigh(RIVAL, asked, frozen_pairs(), found)
    assert (weighed.judged, weighed.pairs, weighed.prompts) == (16, 20, 16)
    assert weighed.win_rate == pytest.approx(6 / 16) and weighed.verdict is Verdict.UNKNOWN
    del found[asked[4].questions[0]]
    fewer = weigh(RIVAL, asked, frozen_pairs(), found)
    assert fewer.verdict is None
    assert fewer.no_verdict == "15 of 20 pairs have an opinion in both orders; a verdict needs 80% of them."


def test_a_frozen_pair_without_an_opinion_counts_as_wrong() -> None:
    asked = pairs(12, 0, 0)
    found = opinions(right, asked)
    del found[frozen_pairs()[0].question]
    assert weigh(RIVAL, asked, frozen_pairs(), found).calibration == pytest.approx(20 / 21)


def test_few_beginnings_give_no_verdict() -> None:
    found = judged(right, pairs(9, 0, 0, seeds=3))
    assert (found.win_rate, found.interval, found.verdict) == (1.0, None, None)
    assert found.no_verdict == "The opinions are about 9 beginnings; a verdict needs 10."
    nothing = judged(right, [])
    assert (nothing.win_rate, nothing.agreement, nothing.verdict) == (None, None, None)


def test_the_seeds_of_one_beginning_do_not_narrow_the_interval() -> None:
    few, many = (judged(right, pairs(10, 0, 10, seeds)).interval for seeds in (1, 8))
    assert few is not None and few == many


def test_equal_texts_are_a_tie_that_nobody_is_asked_about() -> None:
    same = [Pair(f"another {at}", "the same", "the same") for at in range(5)]
    asked = pairs(10, 0, 5, seeds=1)
    assert len(questions([*asked, *same], frozen_pairs())) == 21 + 2 * 15
    found = weigh(RIVAL, [*asked, *same], frozen_pairs(), opinions(right, asked))
    assert found.win_rate == pytest.approx(12.5 / 20) and found.judged == 20
    always_a = weigh(RIVAL, [*asked, *same], frozen_pairs(), opinions(lambda _: Winner.A, asked))
    assert always_a.agreement == 0.0


def test_grades_belong_to_the_texts_in_either_order() -> None:
    found = judged(right, pairs(12, 0, 0))
    assert (found.grades, found.rival_grades) == (GOOD, BAD)


@given(st.data())
def test_changing_sides_mirrors_every_figure(data: st.DataObject) -> None:
    asked = pairs(4, 4, 4)
    drawn: Opinions = {
        question: Opinion(data.draw(st.sampled_from(Winner)), GOOD, BAD)
        for question in {question for pair in asked for question in pair.questions}
        if data.draw(st.booleans())
    }
    here = weigh(RIVAL, asked, frozen_pairs(), drawn)
    there = weigh(RIVAL, [Pair(each.prompt, each.theirs, each.ours) for each in asked], frozen_pairs(), drawn)
    assert (here.judged, here.agreement, here.prompts) == (there.judged, there.agreement, there.prompts)
    assert (here.grades, here.rival_grades) == (there.rival_grades, there.grades)
    assert (here.win_rate is None) == (there.win_rate is None) == (here.judged == 0)
    if here.win_rate is not None and there.win_rate is not None:
        assert here.win_rate == pytest.approx(1 - there.win_rate)
        assert 0 <= here.win_rate <= 1


def test_frozen_pairs_are_spread_among_the_questions() -> None:
    frozen = {each.question for each in frozen_pairs()}
    asked = questions(pairs(16, 0, 0), frozen_pairs())
    assert len(asked) == 64 + 21 and frozen < set(asked)
    for first in range(0, 80, 8):
        assert 1 <= len(frozen & set(asked[first : first + 8])) <= 3


def test_the_frozen_pairs_are_a_story_and_the_same_story_damaged() -> None:
    assert len(frozen_pairs()) == 21
    assert Counter(each.right for each in frozen_pairs()) == {Winner.A: 11, Winner.B: 10}
    for each in frozen_pairs():
        good, bad = each.question.a, each.question.b
        if each.right is Winner.B:
            good, bad = bad, good
        assert good != bad and good.endswith(".") and words(bad) <= words(good)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def written(record: Record, *texts: Continuation) -> Record:
    assert record.writing is not None
    return replace(record, writing=replace(record.writing, continuations=texts))


def test_pairs_are_texts_of_the_same_beginning_and_seed() -> None:
    def text(prompt: str, seed: int, words: str, ended: bool = True) -> Continuation:
        return Continuation(prompt, seed, words, 5, ended, None)

    many = [text(f"{number}", 1, "w") for number in range(8)]
    one = written(
        full(7), text("A", 1, "x"), text("B", 1, "y", ended=False), text("A", 2, "z"), text("A", 1, "x"), *many
    )
    other = written(full(3), *many, text("A", 2, "zz"), text("A", 1, "xx"), text("C", 1, "cc"), text("B", 1, "yy"))
    assert pairs_of(one, other)[:3] == [Pair("A", "x", "xx"), Pair("B", f"y{CUT_OFF}", "yy"), Pair("A", "z", "zz")]
    assert len(pairs_of(one, other)) == 11
    few = written(full(7), *many, text("A", 1, "x"))
    with pytest.raises(FailedPrecondition, match="because they continue 9 beginnings, and a verdict needs 10"):
        pairs_of(few, other)


def test_records_that_do_not_compare_are_not_judged() -> None:
    with pytest.raises(FailedPrecondition, match=r"Version 7 is not judged beside version 3, .* window 512 and 256"):
        pairs_of(full(7), replace(full(3), method=replace(METHOD, window=256)))
    with pytest.raises(FailedPrecondition, match="Version 3 is not judged, because its record has no continuations"):
        pairs_of(full(7), bare(3))


def test_a_judgement_stays_the_same_in_the_file_of_a_record() -> None:
    found = replace(judged(right, pairs(12, 0, 0)), unanswered={"refused": 2}, fingerprints=("fp_1",), cost_usd=0.0125)
    record = replace(full(7), judged=(found,), measured_at={"judged": 5.0})
    assert Record.from_json(record.to_json()) == record
    assert record.since(6.0).judged == ()
