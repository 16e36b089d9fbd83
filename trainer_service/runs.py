"""Runs side by side: the values, the progress and the loss of each."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shared.errors import NotFound, shown
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import TrainSpec


@dataclass(frozen=True)
class Run:
    """A run, read from its job and its versions.

    `values` are all values that define the run, by name. `job` and `state` are None if the job has expired or the run
    was imported. `validation_loss` is the lowest held-out loss in nats per token, None before the first evaluation.
    """

    name: str
    job: str | None
    state: str | None
    values: Mapping[str, object]
    steps: int
    validation_loss: float | None
    bits_per_byte: float | None
    notes: str
    began_at: float | None


def all_runs(jobs: Iterable[JobRecord], registry: Registry) -> list[Run]:
    """Returns every run that has a job or a version, the newest first; `jobs` are training jobs in this order."""
    versions: dict[str, list[VersionManifest]] = {}
    for version in registry.versions():
        versions.setdefault(version.run, []).append(version)
    runs = []
    for job in jobs:
        if isinstance(job.spec, TrainSpec):
            runs.append(_of_job(job, job.spec, versions.pop(job.spec.run, [])))
    others = [_of_versions(name, found) for name, found in versions.items()]
    return sorted([*runs, *others], key=lambda run: run.began_at or 0.0, reverse=True)


def chosen(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Returns the runs with the given names, or all runs without names; raises `NotFound`."""
    known = {run.name: run for run in runs}
    for name in names:
        if name not in known:
            raise NotFound(f"There is no run named {shown(name)}; `gptloop runs` lists those that exist.")
    return [known[name] for name in names] or list(runs)


def differing(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the values that differ between the runs."""
    names = dict.fromkeys(name for run in runs for name in run.values)
    return [name for name in names if any(run.values.get(name) != runs[0].values.get(name) for run in runs)]


def _of_job(job: JobRecord, spec: TrainSpec, versions: Sequence[VersionManifest]) -> Run:
    best = _best(versions)
    loss, bits = (best.validation_loss, best.bits_per_byte) if best else (None, None)
    # The best version may have been pruned.
    if job.best and (loss is None or job.best.validation_loss < loss):
        loss, bits = job.best.validation_loss, job.best.bits_per_byte
    steps = max([job.progress.step if job.progress else 0, *(version.step for version in versions)])
    data = {"dataset": spec.data.dataset, "validation": spec.data.validation, "resume": spec.resume}
    values = {"preset": spec.preset, **data, **spec.config.to_dict()}
    return Run(spec.run, job.id, job.state.value, values, steps, loss, bits, spec.notes, job.enqueued_at)


def _of_versions(name: str, versions: Sequence[VersionManifest]) -> Run:
    first, best = versions[0], _best(versions)
    assert best is not None
    data = {"dataset": first.dataset_files, "validation": first.validation_files, "resume": first.parent}
    return Run(
        name=name,
        job=None,
        state=None,
        values={"preset": first.preset, **data, **first.training},
        steps=max(version.step for version in versions),
        validation_loss=best.validation_loss,
        bits_per_byte=best.bits_per_byte,
        notes=first.notes,
        began_at=first.created_at,
    )


def _best(versions: Sequence[VersionManifest]) -> VersionManifest | None:
    return min(versions, key=lambda version: version.validation_loss, default=None)
