"""Writes files and folders that appear whole or not at all, and survive a power failure."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.errors import (
    AlreadyExists,
    CorruptCheckpoint,
    FailedPrecondition,
    IncompleteCheckpoint,
    StoreFailed,
    UnreadableCheckpoint,
)
from shared.registry.manifest import MANIFEST_NAME, FileRecord
from shared.registry.numbering import children, require_way
from shared.text import excerpt

# The macOS Finder writes it into folders that a person has opened.
IGNORED_NAMES = frozenset({".DS_Store"})

# The errors of file systems that cannot do a full flush, or cannot sync a folder.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY)

# The errors of file systems that cannot give a file a second name, or no further one.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

_NO_SPACE = "free space on its disk, for example by removing old versions"
_NO_ACCESS = "make it writable for this user, or name another folder in GPTLOOP_VAR"
_IN_THE_WAY = "remove the file that is in the place of a folder of the registry"
_ONE_DISK = (
    "all of it must be on one file system: use a link or a mount for the whole registry, not for a folder inside it, "
    "or name a folder on the other file system in GPTLOOP_VAR"
)
_CHECK = "check its disk, and that it is mounted"
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
# The errors that another try would meet again.
_LASTING = (errno.EXDEV, errno.ENOSPC, errno.EDQUOT)


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turns file system errors into `StoreFailed`, which names the place, except that a file or folder is absent."""
    try:
        yield
    except (FileNotFoundError, StoreFailed):
        raise
    except OSError as error:
        advice = "make it readable for this user" if isinstance(error, PermissionError) else _CHECK
        where = error.filename or place
        raise StoreFailed(f"The registry cannot be read: {error.strerror or error} ({where}); {advice}.") from error


@contextmanager
def writing(root: Path | str) -> Iterator[None]:
    """Turns file system errors into `FailedPrecondition`, which names the registry and says what to do; into
    `StoreFailed`, which is one, if another try may succeed."""
    try:
        yield
    except FailedPrecondition:
        raise  # one of another store says so itself
    except OSError as error:
        if isinstance(error.filename, str):
            require_way(Path(error.filename))
        advice = _ADVICE.get(error.errno or 0, _CHECK)
        place = f" ({error.filename})" if error.filename else ""
        # A disk that is away may come back; a full one stays full, and may be the cause of an error without a number.
        kind = FailedPrecondition if error.errno is None or error.errno in _LASTING else StoreFailed
        raise kind(f"The registry {root} cannot be written: {error.strerror or error}{place}; {advice}.") from error


def make_folder(folder: Path, root: Path) -> None:
    """Creates a folder of the registry at `root`, with its parents, so that it survives a power failure.

    Also syncs folders of the registry that exist already: the process that created them may have died before its sync.
    """
    for path in reversed((folder, *folder.parents)):
        if path.is_relative_to(root) or not path.exists():
            path.mkdir(exist_ok=True)
            sync(path.parent)


def record_files(staging: Path) -> tuple[FileRecord, ...]:
    """Syncs and hashes the files of a staging folder, and returns their records."""
    records = []
    for path in sorted(staging.iterdir()):
        sync(path)
        records.append(FileRecord(path.name, path.stat().st_size, sha256(path)))
    return tuple(records)


def seal(staging: Path, manifest: str) -> None:
    """Completes a staging folder: writes the manifest, then syncs the folder."""
    write_synced(staging / MANIFEST_NAME, manifest)
    sync(staging)


def reveal(staging: Path, final: Path) -> None:
    """Moves a sealed folder to its final name in one rename; raises `AlreadyExists` if that name is taken."""
    if final.exists():
        raise AlreadyExists(f"{final} exists already, and a checkpoint is never replaced.")
    move(staging, final, final.parent)


def move(folder: Path, target: Path, visible: Path) -> None:
    """Renames a folder, and syncs the folder `visible`, in which readers see it appear or disappear.

    Without the sync, a power failure could hide a new checkpoint again, or bring a removed one back with some of its
    files missing. So the rename is undone if the sync fails.
    """
    folder.rename(target)
    try:
        sync(visible)
    except OSError:
        with suppress(OSError):
            target.rename(folder)
        raise


def replace_text(path: Path, text: str) -> None:
    """Replaces a text file atomically: readers, also after a power failure, find the old text or the new one."""
    replace_texts({path: text})


def replace_texts(texts: Mapping[Path, str]) -> None:
    """Replaces text files, each one atomically.

    Writes all new texts to the disk before it replaces the first file, so that a full disk leaves all old texts.
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


def link(source: Path, target: Path) -> None:
    """Gives a file that never changes a second name: by a hard link if the file system allows it, else as a copy."""
    try:
        target.hardlink_to(source)
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    shutil.copyfile(source, target)
    sync(target)


def lacking(directory: Path, records: Sequence[FileRecord]) -> str:
    """Describes the first file of a manifest that is missing or too short; returns an empty text if none is.

    Checks names and sizes only. Raises `OSError` if the disk fails.
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
    """Returns a hash of the names, sizes and times of the files in a folder, which changes if any file changes."""
    states = []
    for path in sorted(children(directory)):
        with suppress(FileNotFoundError):
            status = path.stat()
            states.append(f"{path.name!r} {status.st_size} {status.st_mtime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def verify_files(directory: Path, records: Sequence[FileRecord]) -> None:
    """Compares a folder with its manifest.

    Raises `CorruptCheckpoint`, which names the first file that differs, `IncompleteCheckpoint` if a file is missing or
    too short, or `UnreadableCheckpoint`.
    """
    try:
        present = {path.name for path in directory.iterdir()} - IGNORED_NAMES
        if what := lacking(directory, records):
            raise IncompleteCheckpoint(f"{directory} lacks files of its manifest: {what}.")
        expected = {record.name for record in records} | {MANIFEST_NAME}
        if present != expected:
            odd = ", ".join(excerpt(name, 60) for name in sorted(present ^ expected)[:3])
            raise CorruptCheckpoint(f"{directory} does not match its manifest; missing or extra files: {odd}.")
        for record in records:
            path = directory / record.name
            size_bytes = path.stat().st_size
            if size_bytes != record.size_bytes:
                raise CorruptCheckpoint(f"{path} has {size_bytes} bytes, but its manifest says {record.size_bytes}.")
            if sha256(path) != record.sha256:
                raise CorruptCheckpoint(f"{path} has changed: its SHA-256 differs from the one in its manifest.")
    except OSError as error:
        raise UnreadableCheckpoint(f"{error.filename or directory} cannot be read: {error.strerror}.") from error


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _force(descriptor)
    except OSError as error:
        # Some file systems cannot sync a folder, for example those that a virtual machine shares.
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
    # On macOS, fsync leaves data in the cache of the drive.
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
    """Holds the exclusive lock of a lock file inside the block; creates the file, and waits for the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Returns whether a process holds the lock of a lock file; False if there is no file."""
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
