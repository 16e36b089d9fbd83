"""Restores a backup into an empty folder of state and an empty Redis."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import FailedPrecondition, StoreFailed, shown
from shared.registry.commit import locked, make_folder, replace_text, sync
from shared.registry.disk_store import DiskStore
from shared.registry.numbering import children
from shared.service.settings import Directories
from trainer_service.backup.archive import FOLDERS, JOBS_NAME, Description, extract
from trainer_service.backup.jobs_copy import restore_jobs
from trainer_service.backup.running_redis import running_redis
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_client import check_server
from trainer_service.settings import TrainerSettings

# Holds what was extracted, and the hash of the backup once its folders are being moved to their places.
_STAGING = "restoring"
_DIGEST = "digest"
# A registry that has nothing but its id is empty: every command gives it one.
_ID_FILES = {"id", "id.lock"}


def restore_backup(path: Path, settings: TrainerSettings) -> Description:
    """Restores the registry, the jobs and what large teachers were paid for, and returns the backup's description.

    Everything is extracted and compared with its hashes before anything of it can be seen. A restoration that was
    killed can be repeated with the same backup. Raises `FailedPrecondition` if the folder or Redis is not empty, if the
    backup is damaged or newer, or if the disk fails, and `Unavailable` if Redis does not answer.
    """
    directories = settings.directories
    staging = directories.var / _STAGING
    with _disk(directories.var):
        directories.var.mkdir(parents=True, exist_ok=True)
        with locked(directories.var / f"{_STAGING}.lock"):
            begun = _begun(staging)
            if begun is None:
                _require_empty(directories)
                shutil.rmtree(staging, ignore_errors=True)
            files = staging / "files"
            # The files that a killed restoration has begun to move stay: the backup is compared with them only.
            extracted = files if begun is None else staging / "again"
            shutil.rmtree(extracted, ignore_errors=True)
            make_folder(extracted, directories.var)
            description, digest = extract(path, extracted)
            if begun not in (None, digest):
                raise FailedPrecondition(
                    f"The restoration of another backup into {shown(directories.var)} was interrupted: repeat it, or "
                    "name an empty folder in GPTLOOP_VAR."
                )
            if DiskStore(extracted / "registry").id() != description.registry:
                raise FailedPrecondition(f"{shown(path)} is damaged: its registry has another id than its description.")
            _require_place(path, description, settings)
            with running_redis(directories, settings.redis) as redis, (extracted / JOBS_NAME).open("rb") as lines:
                check_server(redis)
                restore_jobs(JobQueue(redis, description.registry), lines, digest)
            _date_folders(files)
            replace_text(staging / _DIGEST, digest)
            # The registry comes last: with it, everything is there.
            for name in reversed(FOLDERS):
                if (files / name).is_dir() and not (name == "registry" and description.url):
                    _move(files / name, directories.registry if name == "registry" else directories.var / name)
            shutil.rmtree(staging)
            sync(directories.var)
    return description


def _require_place(path: Path, description: Description, settings: TrainerSettings) -> None:
    """Raises `FailedPrecondition` unless the registry of a backup is, or can be put, where the settings say."""
    url = settings.directories.registry_url
    if description.url and not (url and settings.open_registry().store.id() == description.registry):
        raise FailedPrecondition(
            f"{shown(path)} has the jobs of a registry in object storage, which was at {shown(description.url)}: "
            "GPTLOOP_REGISTRY must name this registry, or a copy of its objects."
        )
    if url and not description.url:
        raise FailedPrecondition(
            f"{shown(path)} has a registry from a disk: restore it into a folder, without GPTLOOP_REGISTRY."
        )


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except StoreFailed:
        raise  # the registry, and not this place
    except OSError as error:
        raise FailedPrecondition(
            f"The backup cannot be restored into {shown(folder)}: {error.strerror or error}; then repeat it."
        ) from error


def _begun(staging: Path) -> str | None:
    """Returns the hash of the backup whose folders a killed restoration has begun to move, the registry not yet."""
    if not (staging / "files" / "registry").exists():
        return None
    digest = staging / _DIGEST
    return digest.read_text(encoding="utf-8") if digest.exists() else None


def _require_empty(directories: Directories) -> None:
    registry = {each.name for each in children(directories.registry)} - _ID_FILES
    paid = [each for name in FOLDERS if name != "registry" for each in children(directories.var / name)]
    if registry or paid:
        raise FailedPrecondition(
            f"{shown(directories.var)} is not empty: a backup is restored into a new folder, which GPTLOOP_VAR names."
        )


def _date_folders(files: Path) -> None:
    """Gives each folder the time of the newest file in it, by which retention judges the age of a state."""
    folders = [path for path in files.rglob("*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        newest = max((each.stat().st_mtime for each in folder.iterdir()), default=0.0)
        os.utime(folder, (newest, newest))
        sync(folder)


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    sync(target.parent)
