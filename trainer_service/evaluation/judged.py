"""What a judge's opinions say about two versions. Loads no model framework.

The judge reads two continuations of one beginning, A and B, and names the better one, without knowing who wrote them. A
judge prefers some places to others, so each pair is asked for in both orders, and a judge who contradicts itself is not
believed. Neither is one that fails at pairs whose better text is known.
Source: Zheng et al. 2023, "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", section 3.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from enum import Enum
from functools import cache
from operator import itemgetter
from pathlib import Path
from statistics import fmean

from shared.errors import FailedPrecondition
from trainer_service.evaluation.record import Continuation, Grades, Interval, Judged, Record, Subject, Verdict
from trainer_service.evaluation.statistics import FEWEST_UNITS, ratio_interval

# Below these shares there is no verdict.
LEAST_AGREEMENT = 0.6
LEAST_CALIBRATION = 0.8
LEAST_JUDGED = 0.8

# Stands where the evaluation, and not the model, ended a text.
CUT_OFF = " […]"
_EVEN = 0.5
_DAMAGES = ("shuffled", "truncated", "repeated")


class Winner(Enum):
    """The better of the two texts of a question."""

    A = "A"
    B = "B"
    TIE = "tie"


# What the first text of a question wins.
_POINTS = {Winner.A: 1.0, Winner.B: 0.0, Winner.TIE: _EVEN}


@dataclass(frozen=True)
class Question:
    """A beginning and two continuations of it, in the order in which the judge reads them."""

    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Opinion:
    """The judge's answer to a question: the better text, and the grades of both."""

    winner: Winner
    a: Grades
    b: Grades


@dataclass(frozen=True)
class Pair:
    """How the version (`ours`) and its rival (`theirs`) continued a beginning with the same seed."""

    prompt: str
    ours: str
    theirs: str

    @property
    def questions(self) -> tuple[Question, Question]:
        """The question with our text as A, and the one with our text as B."""
        return Question(self.prompt, self.ours, self.theirs), Question(self.prompt, self.theirs, self.ours)


@dataclass(frozen=True)
class FrozenPair:
    """A question whose right answer is known."""

    question: Question
    right: Winner


# The valid opinions by their questions.
Opinions = Mapping[Question, Opinion]


def pairs_of(record: Record, rival: Record) -> list[Pair]:
    """Returns the pairs of continuations of two records, each once.

    Raises `FailedPrecondition`, which says why, if the records do not compare, or if there are too few for a verdict.
    """
    why = f"Version {record.version.number} is not judged beside version {rival.version.number}, because"
    if differences := list(record.method.differences(rival.method)):
        raise FailedPrecondition(f"{why} their evaluations differ: {'; '.join(differences)}.")
    ours, theirs = _continuations(record), _continuations(rival)
    pairs = [Pair(place[0], text, theirs[place]) for place, text in ours.items() if place in theirs]
    beginnings = len({pair.prompt for pair in pairs})
    if beginnings < FEWEST_UNITS:
        raise FailedPrecondition(f"{why} they continue {beginnings} beginnings, and a verdict needs {FEWEST_UNITS}.")
    return pairs


@cache
def frozen_pairs() -> tuple[FrozenPair, ...]:
    """Returns the pairs that a judge must get right; the better text is A and B in turn."""
    path = Path(__file__).with_name("calibration.toml")
    stories = tomllib.loads(path.read_text(encoding="utf-8"))["story"]
    texts = [(story["prompt"], story["good"], story[damage]) for story in stories for damage in _DAMAGES]
    return tuple(
        FrozenPair(Question(prompt, bad, good), Winner.B)
        if at % 2
        else FrozenPair(Question(prompt, good, bad), Winner.A)
        for at, (prompt, good, bad) in enumerate(texts)
    )


def questions(pairs: Sequence[Pair], frozen: Sequence[FrozenPair]) -> list[Question]:
    """Returns everything that the judge is asked, each question once, but for pairs of equal texts.

    The frozen pairs are evenly spread, so that they meet the same judge as the others.
    """
    asked = [question for pair in pairs if pair.ours != pair.theirs for question in pair.questions]
    ranked = [
        ((at + 0.5) / len(each), question)
        for each in ([pair.question for pair in frozen], asked)
        for at, question in enumerate(each)
    ]
    return list(dict.fromkeys(question for _, question in sorted(ranked, key=itemgetter(0))))


def weigh(rival: Subject, pairs: Sequence[Pair], frozen: Sequence[FrozenPair], opinions: Opinions) -> Judged:
    """Returns the figures of a version beside a rival, and the verdict or the reason why there is none.

    A pair counts if both of its questions have an opinion; a tie counts half. The interval comes from resampling
    beginnings, because what is written after one beginning is alike. Two equal texts are a tie that nobody has to
    judge: such a pair counts for the win rate, and not for the agreement.
    """
    points: dict[str, list[float]] = {}
    agreed, ours, theirs = list[bool](), list[Grades](), list[Grades]()
    for pair in pairs:
        if pair.ours == pair.theirs:
            points.setdefault(pair.prompt, []).append(_EVEN)
            continue
        first, second = (opinions.get(question) for question in pair.questions)
        if first is None or second is None:
            continue
        scores = _POINTS[first.winner], 1 - _POINTS[second.winner]
        points.setdefault(pair.prompt, []).append(fmean(scores))
        agreed.append(scores[0] == scores[1])
        ours += (first.a, second.b)
        theirs += (first.b, second.a)
    sums, counts = [sum(each) for each in points.values()], [len(each) for each in points.values()]
    right = [opinions[each.question].winner is each.right for each in frozen if each.question in opinions]
    judged = Judged(
        rival=rival,
        prompts=len(points),
        pairs=len(pairs),
        judged=sum(counts),
        win_rate=sum(sums) / sum(counts) if counts else None,
        interval=ratio_interval(sums, counts) if counts else None,
        agreement=fmean(agreed) if agreed else None,
        calibration=sum(right) / len(frozen),
        calibration_pairs=len(frozen),
        grades=_mean(ours),
        rival_grades=_mean(theirs),
    )
    no_verdict = _no_verdict(judged)
    return replace(judged, no_verdict=no_verdict, verdict=None if no_verdict else _verdict(judged.interval))


def _no_verdict(judged: Judged) -> str:
    """Returns a sentence on why the opinions support no verdict, or an empty text if they do."""
    if judged.judged < LEAST_JUDGED * judged.pairs:
        return (
            f"{judged.judged} of {judged.pairs} pairs have an opinion in both orders; a verdict needs "
            f"{LEAST_JUDGED:.0%} of them."
        )
    if judged.calibration < LEAST_CALIBRATION:
        return (
            f"The judge was right about {judged.calibration:.1%} of {judged.calibration_pairs} pairs whose better text "
            f"is known; a verdict needs {LEAST_CALIBRATION:.0%}."
        )
    if judged.agreement is not None and judged.agreement < LEAST_AGREEMENT:
        return (
            f"The judge said the same in both orders about {judged.agreement:.1%} of the pairs; a verdict needs "
            f"{LEAST_AGREEMENT:.0%}."
        )
    if judged.interval is None:
        return f"The opinions are about {judged.prompts} beginnings; a verdict needs {FEWEST_UNITS}."
    return ""


def _verdict(interval: Interval | None) -> Verdict:
    if interval is not None and interval.low > _EVEN:
        return Verdict.BETTER
    if interval is not None and interval.high < _EVEN:
        return Verdict.WORSE
    return Verdict.UNKNOWN


def _text(each: Continuation) -> str:
    return each.text if each.ended else each.text + CUT_OFF


def _continuations(record: Record) -> dict[tuple[str, int], str]:
    """Returns the texts by their prompts and seeds."""
    if record.writing is None:
        raise FailedPrecondition(
            f"Version {record.version.number} is not judged, because its record has no continuations yet."
        )
    return {(each.prompt, each.seed): _text(each) for each in record.writing.continuations}


def _mean(grades: Sequence[Grades]) -> Grades | None:
    if not grades:
        return None
    return Grades(*(fmean(column) for column in zip(*map(astuple, grades), strict=True)))
