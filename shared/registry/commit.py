"""Making a folder of files appear whole or not at all, and stay after a power failure."""

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.errors import AlreadyExists, CorruptCheckpoint, FailedPrecondition, IncompleteCheckpoint
from shared.registry.manifest import MANIFEST_NAME, FileRecord
from shared.text import excerpt

_CHUNK_BYTES = 1 << 20

# The macOS Finder leaves it in folders that a person has looked at.
IGNORED_NAMES = frozenset({".DS_Store"})

# What file systems without the call for a full flush, or without a flush of folders, answer.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)

_NO_SPACE = "free space on its disk, for example by removing old versions"
_NO_ACCESS = "make it writable for this user, or name another folder in GPTLOOP_VAR"
_IN_THE_WAY = "take away what stands where the registry needs a folder"
_ONE_DISK = (
    "all of it must lie on one file system: let a link or a mount stand for the whole registry, not for a folder in "
    "it, or name a folder on the other one in GPTLOOP_VAR"
)
_ADVICE = {
    errno.EXDEV: _ONE_DISK,
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EROFS: _NO_ACCESS,
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
}


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turns errors of the file system into `FailedPrecondition`, which names the registry and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "see whether its disk is there and in order")
        place = f" ({error.filename})" if error.filename else ""
        raise FailedPrecondition(
            f"The registry {root} cannot be written: {error.strerror or error}{place}; {advice}."
        ) from error


def make_folder(folder: Path, root: Path) -> None:
    """Makes a folder of the registry at `root` and those above it, each of which keeps its name after a power failure.

    Those of the registry are synced even where they exist: who made them may have died before that.
    """
    for path in reversed((folder, *folder.parents)):
        if path.is_relative_to(root) or not path.exists():
            path.mkdir(exist_ok=True)
            sync(path.parent)


def record_files(staging: Path) -> tuple[FileRecord, ...]:
    """What a staging folder holds, each file on the disk; this takes as long as the files are large."""
    records = []
    for path in sorted(staging.iterdir()):
        sync(path)
        records.append(FileRecord(path.name, path.stat().st_size, sha256(path)))
    return tuple(records)


def seal(staging: Path, manifest: str) -> None:
    """Makes a staging folder whole and durable: the manifest, which records its files, then the folder."""
    write_synced(staging / MANIFEST_NAME, manifest)
    sync(staging)


def reveal(staging: Path, final: Path) -> None:
    """Gives a sealed folder its final name in one rename; raises `AlreadyExists` where that name is taken."""
    if final.exists():
        raise AlreadyExists(f"{final} exists already, and a checkpoint is never replaced.")
    staging.rename(final)
    try:
        sync(final.parent)
    except OSError:
        # What may be gone after a power failure must not be seen before it.
        with suppress(OSError):
            final.rename(staging)
        raise


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file whole, so that readers and power failures find the old text or the new one."""
    replace_texts({path: text})


def replace_texts(texts: Mapping[Path, str]) -> None:
    """Replaces text files, each as `replace_text` does.

    All of them are on the disk before the first one is replaced: a full disk leaves the old texts.
    """
    replacements = {path: path.with_name(f"{path.name}.new") for path in texts}
    try:
        for path, replacement in replacements.items():
            write_synced(replacement, texts[path])
        for path, replacement in replacements.items():
            replacement.replace(path)
    except OSError:
        for replacement in replacements.values():
            with suppress(OSError):
                replacement.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in texts}:
        sync(folder)


def lacking(directory: Path, records: tuple[FileRecord, ...]) -> str:
    """What a folder does not hold yet of the files of its manifest, in a few words; empty if it holds all of them.

    Looks at names and sizes only. Raises `OSError` if the disk does not yield them.
    """
    for record in records:
        try:
            size_bytes = (directory / record.name).stat().st_size
        except FileNotFoundError:
            return f"{record.name} is missing"
        if size_bytes < record.size_bytes:
            return f"{record.name} has {size_bytes:,} of {record.size_bytes:,} bytes"
    return ""


def files_state(directory: Path) -> str:
    """Names, sizes and times of the files of a folder in one word, which differs once any of them has changed."""
    states = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        with suppress(FileNotFoundError):
            status = path.stat()
            states.append(f"{path.name!r} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def verify_files(directory: Path, records: tuple[FileRecord, ...]) -> None:
    """Compares a folder with its manifest; raises `CorruptCheckpoint` and names the first file that differs, as
    `IncompleteCheckpoint` if it is missing or too short."""
    try:
        _verify_files(directory, records)
    except OSError as error:
        raise CorruptCheckpoint(f"{error.filename or directory} cannot be read: {error.strerror}.") from error


def _verify_files(directory: Path, records: tuple[FileRecord, ...]) -> None:
    if directory.is_dir() and (what := lacking(directory, records)):
        raise IncompleteCheckpoint(f"{directory} does not hold all files of its manifest: {what}.")
    expected = {record.name for record in records} | {MANIFEST_NAME}
    present = {path.name for path in directory.iterdir()} - IGNORED_NAMES if directory.is_dir() else set()
    if present != expected:
        odd = ", ".join(excerpt(name, 60) for name in sorted(present ^ expected)[:3])
        raise CorruptCheckpoint(f"{directory} does not hold the files of its manifest: missing or extra are {odd}.")
    for record in records:
        path = directory / record.name
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            raise CorruptCheckpoint(f"{path} has {size_bytes} bytes, but its manifest says {record.size_bytes}.")
        if sha256(path) != record.sha256:
            raise CorruptCheckpoint(f"{path} was changed: its SHA-256 is not the one in its manifest.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _force(descriptor)
    except OSError as error:
        # Some file systems, as those that a virtual machine shares, cannot sync a folder.
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and forces it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        _force(file.fileno())


def _force(descriptor: int) -> None:
    # On macOS, fsync leaves what was written in the drive's own cache.
    full_flush = getattr(fcntl, "F_FULLFSYNC", None)
    if full_flush is not None:
        try:
            fcntl.fcntl(descriptor, full_flush)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    os.fsync(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of a lock file, which is made where it is missing; waits for whoever holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of a lock file; False where there is none."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
