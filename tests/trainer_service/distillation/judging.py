"""Two versions to judge, and a process that judges them in a site: `python -m … FOLDER`, with Groq's settings in the
environment."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from tests.trainer_service.evaluation.records import full
from tests.trainer_service.site import Site
from trainer_service.distillation.groq_settings import read_groq
from trainer_service.distillation.judgement import judge_version
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


if __name__ == "__main__":
    judge(replace(Site(Path(sys.argv[1])).attempt(), groq=read_groq(os.environ)))
