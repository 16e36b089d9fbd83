"""The results of a sweep: one row for each candidate, the best first, and a page with a table and a plot."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.registry import policy
from shared.registry.decisions import run_label
from shared.registry.history import EvaluationLine, Line, ReportLine
from shared.registry.registry import Registry
from shared.service.lists import Column
from shared.text import format_duration
from trainer_service.evaluation.views import document
from trainer_service.evaluation.views.document import Note, Plot, Report, Section, Table
from trainer_service.jobs.events import Evaluation, JobState
from trainer_service.jobs.records import JobRecord
from trainer_service.sweep.grid import Member
from trainer_service.sweep.halving import Halving
from trainer_service.sweep.sweep import Sweep

# A page has this many colours for lines.
_NAMED = 6


@dataclass(frozen=True)
class Result:
    """What is known of a candidate.

    member, job: the candidate, and its job.
    losses: the held-out loss of each evaluation in nats per token, by ascending step.
    rungs: that at the steps of the rungs to which it has come.
    bits_per_byte: at the last of these rungs.
    step: the last step that is known to be done.
    training_s: the time that its steps took, without evaluations.
    version: the best version of its run that is in the registry.
    """

    member: Member
    job: JobRecord
    losses: Mapping[int, float]
    rungs: Mapping[int, float]
    bits_per_byte: float | None
    step: int
    training_s: float
    version: int | None

    @property
    def state(self) -> str:
        """Where it is, in one word."""
        if self.job.state is JobState.CANCELLED and self.job.reason:
            return "stopped"  # a sweep gives a reason, and a person does not
        return "waits" if self.job.is_suspended else self.job.state.value

    @property
    def order(self) -> tuple[float, float, int]:
        """Sorts candidates: those that came to the furthest rung first, then by their losses there."""
        last = max(self.rungs, default=0)
        return -last, self.rungs.get(last, math.inf), self.member.number


def results(sweep: Sweep, jobs: Sequence[JobRecord], registry: Registry) -> list[Result]:
    """Returns the result of each candidate, the best one first."""
    versions = registry.versions()
    known = registry.known(versions)
    found = []
    for member, job in zip(sweep.members, jobs, strict=True):
        lines = _lines(registry, member.spec.run)
        reports = [each for each in lines if isinstance(each, ReportLine)]
        # A registry that could not be written has no line of an evaluation that the job reported.
        evaluations = dict[int, Evaluation | EvaluationLine]()
        if job.evaluation:
            evaluations[job.evaluation.step] = job.evaluation
        evaluations |= {each.step: each for each in lines if isinstance(each, EvaluationLine)}
        rungs = [step for step in sweep.halving.steps if step in evaluations]
        found.append(
            Result(
                member,
                job,
                {step: evaluations[step].validation_loss for step in sorted(evaluations)},
                {step: evaluations[step].validation_loss for step in rungs},
                evaluations[rungs[-1]].bits_per_byte if rungs else None,
                max([job.progress.step if job.progress else 0, *evaluations]),
                _training_s(reports),
                policy.number_of(run_label(member.spec.run), versions, known),
            )
        )
    return sorted(found, key=lambda each: each.order)


def _lines(registry: Registry, run: str) -> list[Line]:
    try:
        return registry.histories.reader(run).read()[0]
    except FileNotFoundError:
        return []


def _training_s(reports: Sequence[ReportLine]) -> float:
    tokens, total_s = 0, 0.0
    for each in reports:
        total_s += (each.tokens - tokens) / each.tokens_per_second if each.tokens_per_second else 0.0
        tokens = each.tokens
    return total_s


def columns(ranked: Sequence[Result], halving: Halving) -> tuple[Column[Result], ...]:
    """Returns the columns of the list of results."""
    rank = {each.member.number: place for place, each in enumerate(ranked, start=1)}

    def rung(step: int, omitted: int) -> Column[Result]:
        return Column(
            f"step {step:,}",
            lambda each: each.rungs.get(step),
            lambda each: _loss(each.rungs.get(step)),
            key=f"loss_at_step_{step}",
            rank=omitted,
            right=True,
        )

    *earlier, last = halving.steps
    return (
        Column("rank", lambda each: rank[each.member.number], right=True),
        Column("candidate", lambda each: each.member.number, right=True),
        Column("values", lambda each: dict(each.member.values), lambda each: each.member.text, wraps=True),
        *(rung(step, len(earlier) - place) for place, step in enumerate(earlier)),
        rung(last, 0),
        Column(
            "bits per byte",
            lambda each: each.bits_per_byte,
            lambda each: _loss(each.bits_per_byte),
            rank=len(earlier) + 2,
            right=True,
        ),
        Column("steps", lambda each: each.step, lambda each: f"{each.step:,}", rank=len(earlier) + 4, right=True),
        Column(
            "time",
            lambda each: each.training_s,
            lambda each: format_duration(each.training_s) if each.training_s else "",
            key="training_seconds",
            rank=len(earlier) + 3,
            right=True,
        ),
        Column("state", lambda each: each.state, rank=len(earlier) + 1),
        Column("version", lambda each: each.version, rank=0, right=True),
        Column("", lambda each: each.member.spec.run, key="run"),
        Column("", lambda each: each.job.id, key="job"),
    )


def report(name: str, ranked: Sequence[Result], halving: Halving) -> Report:
    """Returns the page of a sweep."""
    shown = [column for column in columns(ranked, halving) if column.heading]
    table = Table(
        tuple(column.heading for column in shown),
        tuple(tuple(column.shown(each) for column in shown) for each in ranked),
        left=tuple(place for place, column in enumerate(shown) if not column.right),
    )
    steps = [f"{size:,} to step {step:,}" for size, step in zip(halving.sizes, halving.steps, strict=True)]
    note = Note(
        "Losses are held out, in nats per token, at the steps of the rungs. Bits per byte are at the last of them."
    )
    plot = _plot(ranked)
    return Report(
        f"Sweep {name}",
        f"{len(ranked)} candidates: {', '.join(steps)}.",
        (Section("Candidates", (note, table, *([plot] if plot else []))),),
    )


def _plot(ranked: Sequence[Result]) -> Plot | None:
    """Draws the losses of each candidate, the best ones in colours; None before the first evaluation."""
    curves = list[tuple[Result, list[tuple[int, float]]]]()
    for each in ranked:
        # A model that predicts all tokens alike has this loss; a curve above it would flatten all others.
        highest = math.log(each.member.spec.config.vocabulary_size)
        if points := [(step, loss) for step, loss in each.losses.items() if loss <= highest]:
            curves.append((each, points))
    if not curves:
        return None
    lines = [
        document.Line(f"{each.member.number}: {each.member.text}", *_axes(points), colour)
        for colour, (each, points) in enumerate(curves[:_NAMED])
    ]
    if others := curves[_NAMED:]:
        # One line with gaps, because a page cannot name a hundred.
        apart = [point for _, points in others for point in (*points, (points[-1][0], math.nan))]
        lines.insert(0, document.Line(f"{len(others)} others", *_axes(apart), None))
    best, points = curves[0]
    return Plot(
        title="Held-out loss over steps",
        description=f"The best is candidate {best.member.number}, {best.member.text}: {points[-1][1]:.4f} after "
        f"{points[-1][0]:,} steps. A line ends where its candidate does.",
        x_label="steps",
        y_label="nats per token",
        lines=tuple(lines),
    )


def _axes(points: Sequence[tuple[int, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(float(step) for step, _ in points), tuple(loss for _, loss in points)


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
