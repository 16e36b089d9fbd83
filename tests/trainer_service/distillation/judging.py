"""Two versions to judge, how a service judges them, and a process that judges them in a site: `python -m … FOLDER`,
with Groq's settings in the environment."""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from tests.trainer_service.evaluation.records import full
from tests.trainer_service.site import Site
from trainer_service.distillation.groq_settings import read_groq
from trainer_service.distillation.judgement import SCHEMA, judge_version
from trainer_service.evaluation.judged import Question, Winner, frozen_pairs
from trainer_service.evaluation.record import Continuation, Judged, Record
from trainer_service.jobs.attempt import Attempt

BEGINNINGS = 12
LIMIT_USD = Decimal("0.5")


def record(number: int, words: Callable[[int], str]) -> Record:
    """Returns a record with two continuations of each beginning, which begin with the words for it."""
    found = full(number)
    assert found.writing is not None
    texts = tuple(
        Continuation(f"Beginning {at}", seed, f"{words(at)} {seed}", 5, True, None)
        for at in range(BEGINNINGS)
        for seed in (1, 2)
    )
    version = replace(found.version, digest=f"{number:064}")
    return replace(found, version=version, writing=replace(found.writing, continuations=texts))


RIVAL = record(3, lambda at: "a story" if at else "less short")
# Longer after all beginnings but one.
VERSION = record(7, lambda at: "a long story" if at else "short")


def judge(attempt: Attempt, rivals: Sequence[Record] = (RIVAL,), limit_usd: Decimal = LIMIT_USD) -> list[Judged]:
    """Judges `VERSION` beside rivals."""
    return list(judge_version(VERSION, rivals, limit_usd, attempt))


JudgeScript = Callable[[Question], Winner]


def answering(judge: JudgeScript) -> Callable[[Mapping[str, Any]], str]:
    """Returns how the service answers if `judge` judges."""

    def write(body: Mapping[str, Any]) -> str:
        found = re.fullmatch(
            r"<beginning>\n(.*)\n</beginning>\n\n<A>\n(.*)\n</A>\n\n<B>\n(.*)\n</B>",
            body["messages"][-1]["content"],
            re.S,
        )
        assert found and body["response_format"]["json_schema"]["schema"] == SCHEMA
        return answer(judge(Question(*found.groups())))

    return write


def answer(winner: Winner, **grades: int) -> str:
    marks = {"grammar": 8, "consistency": 7, "creativity": 6} | grades
    return json.dumps({"a": marks, "b": marks, "winner": winner.value})


def fair(question: Question) -> Winner:
    """Judges frozen pairs right, and of other texts prefers the longer one."""
    frozen = {each.question: each.right for each in frozen_pairs()}
    if question in frozen or len(question.a) == len(question.b):
        return frozen.get(question, Winner.TIE)
    return Winner.A if len(question.a) > len(question.b) else Winner.B


if __name__ == "__main__":
    judge(replace(Site(Path(sys.argv[1])).attempt(), groq=read_groq(os.environ)))
