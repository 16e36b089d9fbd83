"""Records of evaluations with made-up figures."""

import math
from collections.abc import Sequence
from dataclasses import replace

from trainer_service.evaluation.method import HeldOutText, Method
from trainer_service.evaluation.record import (
    Continuation,
    DecodingSpeed,
    Grades,
    Interval,
    Judged,
    Memory,
    MinimalPairs,
    Overfit,
    Percentiles,
    PositionLoss,
    Record,
    Speed,
    Subject,
    TextQuality,
    TrainingLoss,
    TrainingMemory,
    Verdict,
    Writing,
    WritingFigures,
)

METHOD = Method(
    HeldOutText("stories", "r1", 4000, 16_000, 40, "ab" * 32),
    "cd" * 32,
    512,
    256,
    "float32",
    "cpu",
    1,
    8,
    (1,),
    50,
    0.8,
)


def quality(unit_nats: Sequence[float], tokens: int = 100) -> TextQuality:
    """Returns the quality for documents of `tokens` tokens each."""
    mean = sum(unit_nats) / (tokens * len(unit_nats))
    places = ((0, 31), (32, 127), (128, 511))
    return TextQuality(
        nats_per_token=mean,
        perplexity=math.exp(mean),
        bits_per_byte=mean * 0.36,
        interval=Interval(mean - 0.01, mean + 0.01),
        unit="document",
        unit_nats=tuple(unit_nats),
        unit_tokens=(tokens,) * len(unit_nats),
        positions=tuple(PositionLoss(*place, mean + 0.5 - 0.2 * at, 900) for at, place in enumerate(places)),
    )


def bare(number: int, unit_nats: Sequence[float] | None = None, method: Method = METHOD, run: str = "calm") -> Record:
    """Returns a record with figures on text at most."""
    text = None if unit_nats is None else quality(unit_nats)
    return Record(Subject(number, run, 100 * number, "ef" * 32, 1_234_567), method, text)


def full(number: int, mean: float = 2.5, text: str = "The cat ran.", run: str = "calm") -> Record:
    """Returns a record with every section; its continuation is `text`."""
    figures = WritingFigures(1, 50, (0.2, 0.6, 0.9), 0.031, 0.8, 12.0, 31)
    times = Percentiles(4.0, 5.0, 9.0)
    record = bare(number, [100 * (mean + 0.001 * unit) for unit in range(40)], run=run)
    return replace(
        record,
        training=TrainingLoss(mean - 0.05, 4000, Interval(2.4, 2.5), 0.05, Interval(0.04, 0.06), Overfit.SLIGHT),
        writing=Writing(figures, figures, 9000, (Continuation("Once upon a time", 1, text, 50, True, 14),)),
        speed=Speed("a processor", 2, 16, 5400.0, 9100.0, (DecodingSpeed(8, 905.0, times, times),)),
        memory=Memory(98 << 20, 196 << 20, 1 << 10, 512 << 20, (TrainingMemory(4, 90 << 20, 390 << 20, 415 << 20),)),
        pairs=(MinimalPairs("anaphor.jsonl", "aa", 1000, 0.874, Interval(0.85, 0.89)),),
        measured_at={"text": 1.7e9},
    )


def judged(number: int, no_verdict: str = "") -> Judged:
    """Returns what a judge says about a version beside that of a number."""
    return Judged(
        rival=bare(number).version,
        prompts=16,
        pairs=32,
        judged=31,
        win_rate=0.621,
        interval=Interval(0.5312, 0.701),
        agreement=0.75,
        calibration=0.952,
        calibration_pairs=21,
        grades=Grades(7.5, 6.25, 5.0),
        rival_grades=Grades(7.0, 6.0, 5.5),
        verdict=None if no_verdict else Verdict.BETTER,
        no_verdict=no_verdict,
        model="openai/gpt-oss-20b",
        fingerprints=("fp_1", "fp_2"),
        template="judge-1",
        unanswered={"empty": 1, "malformed": 2},
        cost_usd=0.01234,
    )
