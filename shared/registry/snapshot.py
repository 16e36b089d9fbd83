"""A registry on a disk as it is at one moment, while others write to it: hard links take no time and no space."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.registry.commit import link
from shared.registry.disk_store import DiskStore
from shared.registry.numbering import children
from shared.registry.registry import Checkpoint, Registry

# The small files of a run, which change; its states and teachers never do.
_RUN_FILES = ("fence", "ended", "history.jsonl", "teachers.json")


@contextmanager
def snapshot(store: DiskStore) -> Iterator[Path]:
    """Yields a folder that holds the registry as it is now, and removes it at the end.

    It holds every state and version that has been written and not removed, with the state of each version. Locks and
    unfinished checkpoints are left out. Raises `FailedPrecondition` if the disk fails.
    """
    root, registry = store.root, Registry(store)
    with store.new_folder() as folder:
        # A decision names versions that exist when it is made, so decisions are read first.
        _copy_all(root, folder, "serving")
        seen = set[Checkpoint]()
        # A state is written before its version, so versions are listed first; what has appeared since is added.
        while new := [each for each in registry.checkpoints() if each not in seen]:
            for checkpoint in new:
                seen.add(checkpoint)
                _freeze(store.path(checkpoint.name), folder, root)
        for run in registry.runs():
            directory = root / "runs" / run
            for name in _RUN_FILES:
                _copy(directory / name, folder, root)
            for teacher in children(directory / "teachers"):
                _freeze(teacher, folder, root)
        _copy_all(root, folder, "holds")
        for version in children(folder / "versions"):
            _copy_all(root, folder, f"evaluations/{version.name}")
        # The highest number of all, so it is read last.
        for name in ("id", "last_version"):
            _copy(root / name, folder, root)
        yield folder


def _freeze(source: Path, folder: Path, root: Path) -> None:
    """Links the files of an immutable folder; all of them, or none if it has been removed."""
    target = folder / source.relative_to(root)
    target.mkdir(parents=True)
    try:
        for path in source.iterdir():
            link(path, target / path.name)
        source.stat()
    except FileNotFoundError:
        shutil.rmtree(target)


def _copy_all(root: Path, folder: Path, name: str) -> None:
    for path in (root / name).rglob("*"):
        # Such a file is being written.
        if path.suffix != ".new":
            _copy(path, folder, root)


def _copy(path: Path, folder: Path, root: Path) -> None:
    """Copies a file that is replaced whole or appended to, if it exists."""
    target = folder / path.relative_to(root)
    if path.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            shutil.copy2(path, target)
