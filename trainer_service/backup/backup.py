"""Writes a backup while training and serving go on."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shared.atomic_file import replacing
from shared.errors import AlreadyExists, FailedPrecondition, StoreFailed, shown
from shared.registry.disk_store import DiskStore
from shared.registry.numbering import numbers
from shared.registry.snapshot import snapshot
from shared.service.settings import Directories
from trainer_service.backup.archive import JOBS_NAME, Writer
from trainer_service.backup.jobs_copy import copy_jobs
from trainer_service.backup.running_redis import running_redis
from trainer_service.jobs.job_store import JobStore
from trainer_service.settings import TrainerSettings

# Appended to only, like the ledgers in them, and paid for.
_PAID = ("stories", "judgements")


@dataclass(frozen=True)
class Contents:
    """How much is in a backup."""

    versions: int
    states: int
    jobs: int
    size_bytes: int


def write_backup(path: Path, settings: TrainerSettings) -> Contents:
    """Writes the registry, the jobs and what large teachers were paid for into a new file, whole or not at all.

    A registry in object storage is left out: its provider keeps it. Raises `AlreadyExists` if there is such a file,
    `FailedPrecondition` if the disk fails, and `Unavailable` if Redis does not answer.
    """
    if path.exists() or path.is_symlink():
        raise AlreadyExists(f"{shown(path)} exists already: name a new file.")
    directories = settings.directories
    identity = settings.open_registry().store.id()
    with _disk(path), tempfile.TemporaryFile(dir=path.parent) as jobs:
        with running_redis(directories, settings.redis) as redis:
            # Read before the registry: what a job has written by now is in it.
            count = _copy(JobStore(redis, identity), jobs)
        with _frozen(directories, identity) as frozen, _disk(path):
            with replacing(path, mode=0o600) as file, Writer(file, identity, directories.registry_url) as writer:
                writer.add_file(JOBS_NAME, jobs)
                _add_folder(writer, frozen, "registry")
                for name in _PAID:
                    _add_folder(writer, directories.data / name, f"data/{name}")
            versions = len(numbers(frozen / "versions"))
            states = sum(len(numbers(run / "states")) for run in (frozen / "runs").glob("*"))
    return Contents(versions, states, count, path.stat().st_size)


@contextmanager
def _frozen(directories: Directories, identity: str) -> Iterator[Path]:
    """Yields a folder with the registry as it is now; with its id only if it is in object storage."""
    if not directories.registry_url:
        with snapshot(DiskStore(directories.registry)) as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "id").write_text(identity, encoding="utf-8")
        yield Path(temporary)


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreFailed:
        raise  # the registry, and not this place
    except OSError as error:
        raise FailedPrecondition(
            f"The backup {shown(path)} cannot be written: {error.strerror or error}; no such file was made."
        ) from error


def _copy(store: JobStore, file: BinaryIO) -> int:
    count = -1  # the first line has the counters
    for line in copy_jobs(store):
        file.write(line)
        count += 1
    file.flush()
    file.seek(0)
    return max(count, 0)


def _add_folder(writer: Writer, folder: Path, name: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                writer.add_file(f"{name}/{path.relative_to(folder).as_posix()}", file)
