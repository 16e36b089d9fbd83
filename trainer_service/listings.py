"""What people see of jobs and of published versions, in lists."""

import time
from collections.abc import Sequence

from shared import cli
from shared.lists import Column, print_list
from shared.registry.manifest import VersionManifest
from shared.registry.policy import labels_of
from shared.registry.store import Registry
from trainer_service.follow import describe_job
from trainer_service.records import JobRecord


def print_jobs(records: Sequence[JobRecord], as_json: bool) -> None:
    """The jobs in the order given."""
    columns = (
        Column[JobRecord]("job", lambda job: job.id),
        Column[JobRecord]("kind", lambda job: job.kind.value, rank=1),
        Column[JobRecord]("state", lambda job: job.state.value),
        Column[JobRecord]("run", lambda job: job.spec.run, rank=2),
        Column[JobRecord](
            "data",
            lambda job: job.spec.data.dataset,
            lambda job: ", ".join(name.rpartition("/")[2] for name in job.spec.data.dataset),
            key="dataset",
            rank=4,
        ),
        Column[JobRecord](
            "enqueued",
            lambda job: job.enqueued_at,
            lambda job: f"{cli.duration(time.time() - job.enqueued_at)} ago",
            key="enqueued_at",
            rank=3,
        ),
        Column[JobRecord]("last progress", describe_job, wraps=True),
    )
    print_list(records, columns, as_json=as_json, empty="No job yet: put one on the queue with `make train`.")


def print_checkpoints(registry: Registry, as_json: bool) -> None:
    """Every version in the registry, the oldest first."""
    labels = registry.labels()
    columns = (
        Column[VersionManifest]("version", lambda each: each.version, right=True),
        Column[VersionManifest]("step", lambda each: each.step, lambda each: f"{each.step:,}", rank=1, right=True),
        Column[VersionManifest](
            "training loss",
            lambda each: each.training_loss,
            lambda each: f"{each.training_loss:.4f}",
            rank=5,
            right=True,
        ),
        Column[VersionManifest](
            "held-out loss",
            lambda each: each.validation_loss,
            lambda each: f"{each.validation_loss:.4f}",
            right=True,
        ),
        Column[VersionManifest](
            "bits per byte", lambda each: each.bits_per_byte, lambda each: f"{each.bits_per_byte:.4f}", right=True
        ),
        Column[VersionManifest](
            "size",
            lambda each: each.size_bytes,
            lambda each: f"{each.size_bytes / 2**20:.1f} MiB",
            key="size_bytes",
            rank=4,
            right=True,
        ),
        Column[VersionManifest](
            "age",
            lambda each: each.created_at,
            lambda each: cli.duration(time.time() - each.created_at),
            key="created_at",
            rank=3,
            right=True,
        ),
        Column[VersionManifest]("labels", lambda each: labels_of(each.version, labels), wraps=True),
        Column[VersionManifest]("run", lambda each: each.run, rank=2),
    )
    print_list(
        registry.versions(),
        columns,
        as_json=as_json,
        empty="No version yet: the first one comes with the first evaluation of a training job.",
    )
    if not as_json and (sentence := registry.other_text()):
        print(sentence)
