"""A registry as it is at one moment, while others write to it: by hard links, so that it takes no time and no space."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.registry.commit import link
from shared.registry.numbering import children
from shared.registry.staging import Staging
from shared.registry.store import Checkpoint, Registry

# The small files of a run, which change; its states and teachers never do.
_RUN_FILES = ("fence", "ended", "history.jsonl", "teachers.json")


@contextmanager
def snapshot(registry: Registry) -> Iterator[Path]:
    """Yields a folder that holds the registry as it is now, and removes it at the end.

    It holds every state and version that has been written and not removed, with the state of each version. Locks and
    unfinished checkpoints are left out. Raises `FailedPrecondition` if the disk fails.
    """
    with Staging(registry.root).new(registry.root) as folder:
        # A decision names versions that exist when it is made, so decisions are read first.
        _copy_all(registry.root, folder, "serving")
        seen = set[Checkpoint]()
        # A state is written before its version, so versions are listed first; what has appeared since is added.
        while new := [each for each in registry.checkpoints() if each not in seen]:
            for checkpoint in new:
                seen.add(checkpoint)
                _freeze(registry.directory(checkpoint), folder, registry.root)
        for run in registry.runs():
            for name in _RUN_FILES:
                _copy(registry.run_directory(run) / name, folder, registry.root)
            for teacher in children(registry.teachers.folder(run)):
                _freeze(teacher, folder, registry.root)
        _copy_all(registry.root, folder, "holds")
        for version in children(folder / "versions"):
            _copy_all(registry.root, folder, f"evaluations/{version.name}")
        # The highest number of all, so it is read last.
        for name in ("id", "last_version"):
            _copy(registry.root / name, folder, registry.root)
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
