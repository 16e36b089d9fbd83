"""Measures how much disk space each kind of file takes."""

import stat
from collections.abc import Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared.service.settings import Directories


@dataclass(frozen=True)
class Usage:
    """The disk space that a kind of file takes, and advice on how to free it."""

    kind: str
    path: Path
    size_bytes: int
    advice: str


def usage(directories: Directories) -> list[Usage]:
    """Returns the usage of each kind of file below `GPTLOOP_VAR`.

    Counts every file once, whatever its names: a teacher of a run takes space of its own only once its version has been
    removed.
    """
    registry = directories.registry
    parts = [
        (
            "versions",
            registry / "versions",
            "`gptloop prune`, GPTLOOP_KEEP_NEWEST, GPTLOOP_KEEP_BEST, GPTLOOP_KEEP_BYTES",
        ),
        (
            "states, teachers, histories",
            registry / "runs",
            "`gptloop prune`, GPTLOOP_KEEP_STATES, GPTLOOP_KEEP_RUNS, GPTLOOP_KEEP_BYTES",
        ),
        ("evaluations", registry / "evaluations", "removed with their versions"),
        ("reports", directories.reports, "you can remove them; `gptloop eval` and `gptloop sweep` write them again"),
        ("stories", directories.data / "stories", "a large teacher was paid for them: nothing removes them"),
        ("judgements", directories.data / "judgements", "a large teacher was paid for them: nothing removes them"),
        ("prepared text", directories.data, "removed after 30 days without use; prepared again if it is missing"),
        ("jobs", directories.redis, "the files of Redis; jobs that have ended are removed after 30 days"),
        ("logs", directories.log, "you can remove them while no process runs"),
        (
            "copies of the registry",
            directories.registry_cache,
            "GPTLOOP_REGISTRY_CACHE_BYTES; fetched again",
        ),
        ("compiled", directories.cache, "you can remove it while no process runs; compiled again if it is missing"),
    ]
    counted: set[tuple[int, int]] = set()
    known = {path for _, path, _ in parts} | {registry}
    found = [Usage(kind, path, _size_bytes([path], known, counted), advice) for kind, path, advice in parts]
    return [*found, Usage("other", directories.var, _size_bytes([directories.var, registry], known, counted), "")]


def _size_bytes(paths: Iterable[Path], known: Container[Path], counted: set[tuple[int, int]]) -> int:
    """Returns the disk space of files and of the files in folders, except those that are counted already.

    Folders in these folders that are `known` are left out. Links and unreadable files count as 0. Adds the device and
    the inode of each file that has several names.
    """
    size_bytes, unvisited = 0, list(paths)
    while unvisited:
        path = unvisited.pop()
        with suppress(OSError):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                unvisited += [each for each in path.iterdir() if each not in known]
            elif stat.S_ISREG(found.st_mode) and (inode := (found.st_dev, found.st_ino)) not in counted:
                # The holes of a sparse file take no space.
                size_bytes += min(found.st_blocks * 512, found.st_size)
                if found.st_nlink > 1:
                    counted.add(inode)
    return size_bytes
