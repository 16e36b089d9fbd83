"""Lists of jobs, runs and versions for users."""

import time
from collections.abc import Sequence
from dataclasses import asdict

from shared.registry.evaluations import comparable, one_of_each
from shared.registry.manifest import VersionManifest
from shared.registry.policy import describe_unranked, labels_of
from shared.registry.registry import Registry
from shared.service.lists import Column, print_list
from shared.text import format_duration, format_size
from trainer_service.follow import describe_job
from trainer_service.jobs.records import JobRecord
from trainer_service.runs import Run, differing

_LISTED_FILES = 3


def print_jobs(records: Sequence[JobRecord], as_json: bool) -> None:
    """Prints jobs in the given order."""
    columns: tuple[Column[JobRecord], ...] = (
        Column("job", lambda job: job.id),
        Column("kind", lambda job: job.kind and job.kind.value, rank=1),
        Column("state", lambda job: job.state.value),
        Column("run", lambda job: job.spec and job.spec.run, rank=2),
        Column(
            "data",
            lambda job: job.spec.data.dataset if job.spec else [],
            lambda job: _files(job.spec.data.dataset) if job.spec else "",
            key="dataset",
            rank=4,
        ),
        Column(
            "enqueued",
            lambda job: job.enqueued_at,
            lambda job: f"{format_duration(time.time() - job.enqueued_at)} ago" if job.enqueued_at else "",
            key="enqueued_at",
            rank=3,
        ),
        Column("last progress", describe_job, wraps=True),
        Column("", lambda job: job.ahead, key="jobs_ahead"),
        Column("", lambda job: job.awaited, key="awaited"),
    )
    print_list(records, columns, as_json=as_json, empty="No job yet: queue one with `gptloop train`.")


def print_runs(runs: Sequence[Run], as_json: bool) -> None:
    """Prints runs in the given order, with the values in which they differ; JSON has all values."""

    def value_column(name: str, rank: int) -> Column[Run]:
        return Column(name, lambda run: run.values.get(name), lambda run: _value(run.values.get(name)), rank=rank)

    different = [] if as_json else differing(runs)
    columns: tuple[Column[Run], ...] = (
        Column("run", lambda run: run.name),
        Column("state", lambda run: run.state, rank=2),
        Column("steps", lambda run: run.steps, lambda run: f"{run.steps:,}", rank=1, right=True),
        Column("held-out loss", lambda run: run.validation_loss, lambda run: _loss(run.validation_loss), right=True),
        Column("bits per byte", lambda run: run.bits_per_byte, lambda run: _loss(run.bits_per_byte), right=True),
        # On a narrow terminal the last values are left out first.
        *(value_column(name, rank) for rank, name in enumerate(different, start=3)),
        Column("notes", lambda run: run.notes, rank=len(different) + 3, wraps=True),
        Column("", lambda run: run.values, key="values"),
        Column("", lambda run: run.job, key="job"),
        Column("", lambda run: run.began_at, key="began_at"),
    )
    print_list(runs, columns, as_json=as_json, empty="No run yet: queue one with `gptloop train`.")


def print_checkpoints(registry: Registry, as_json: bool) -> None:
    """Prints every version in the registry, the oldest first."""
    versions, labels = registry.versions(), registry.labels()
    evaluations = registry.evaluations.of(versions)
    evaluated, compared = one_of_each(evaluations), comparable(evaluations)

    def evaluation(version: VersionManifest) -> str:
        """Returns the bits per byte, in parentheses if they were measured by another method than the newest ones."""
        if (figures := evaluated.get(version.version)) is None:
            return ""
        return _loss(figures.bits_per_byte) if version.version in compared else f"({_loss(figures.bits_per_byte)})"

    columns: tuple[Column[VersionManifest], ...] = (
        Column("version", lambda each: each.version, right=True),
        Column("step", lambda each: each.step, lambda each: f"{each.step:,}", rank=1, right=True),
        Column(
            "training loss", lambda each: each.training_loss, lambda each: _loss(each.training_loss), rank=5, right=True
        ),
        Column(
            "held-out loss", lambda each: each.validation_loss, lambda each: _loss(each.validation_loss), right=True
        ),
        Column("bits per byte", lambda each: each.bits_per_byte, lambda each: _loss(each.bits_per_byte), right=True),
        Column(
            "evaluated" if evaluated else "",
            lambda each: asdict(evaluated[each.version]) if each.version in evaluated else None,
            evaluation,
            key="evaluation",
            rank=2,
            right=True,
        ),
        Column(
            "size",
            lambda each: each.size_bytes,
            lambda each: format_size(each.size_bytes),
            key="size_bytes",
            rank=4,
            right=True,
        ),
        Column(
            "age",
            lambda each: each.created_at,
            lambda each: format_duration(time.time() - each.created_at),
            key="created_at",
            rank=3,
            right=True,
        ),
        Column("labels", lambda each: labels_of(each.version, labels), wraps=True),
        Column("run", lambda each: each.run, rank=2),
    )
    print_list(
        versions,
        columns,
        as_json=as_json,
        empty="No version yet: the first one comes with the first evaluation of a training job.",
    )
    if not as_json and (sentence := describe_unranked(versions, registry.known(versions))):
        print(sentence)


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return _files([str(each) for each in value])
    return "" if value is None else str(value)


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _files(names: Sequence[str]) -> str:
    """Returns the names of the first files without their folders, and the number of the others."""
    text = ", ".join(name.rpartition("/")[2] for name in names[:_LISTED_FILES])
    return text if len(names) <= _LISTED_FILES else f"{text} and {len(names) - _LISTED_FILES:,} more"
