"""Making a folder of files appear whole or not at all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_UN, flock
from pathlib import Path

from shared.errors import AlreadyExists, CorruptCheckpoint
from shared.registry.manifest import MANIFEST_NAME, FileRecord

_CHUNK_BYTES = 1 << 20


def seal(staging: Path, manifest: Callable[[tuple[FileRecord, ...]], str]) -> None:
    """Makes a staging folder durable: every file synced, then the manifest, which records them, then the folder."""
    records = []
    for path in sorted(staging.iterdir()):
        sync(path)
        records.append(FileRecord(path.name, path.stat().st_size, sha256(path)))
    write_synced(staging / MANIFEST_NAME, manifest(tuple(records)))
    sync(staging)


def reveal(staging: Path, final: Path) -> None:
    """Gives a sealed folder its final name in one rename; raises `AlreadyExists` where that name is taken."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        raise AlreadyExists(f"{final} exists already, and a checkpoint is never replaced.")
    staging.rename(final)
    sync(final.parent)


def verify_files(directory: Path, records: tuple[FileRecord, ...]) -> None:
    """Compares a folder with its manifest; raises `CorruptCheckpoint` and names the first file that differs."""
    expected = {record.name for record in records} | {MANIFEST_NAME}
    present = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if present != expected:
        odd = ", ".join(sorted(present ^ expected))
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
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Writes a text file and forces it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of a lock file, which is made where it is missing; waits for whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        flock(descriptor, LOCK_EX)
        yield
        flock(descriptor, LOCK_UN)
    finally:
        os.close(descriptor)
