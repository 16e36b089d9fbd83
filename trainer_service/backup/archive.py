"""The file of a backup: a tar whose first member describes it, and whose last one lists the hash of every other."""

import hashlib
import json
import os
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, Self

from shared.errors import FailedPrecondition, shown
from shared.text import excerpt

FORMAT = 1
DESCRIPTION_NAME = "backup.json"
HASHES_NAME = "hashes.json"
# The files of these folders, and no others, are in a backup.
FOLDERS = ("registry", "data/stories", "data/judgements")
JOBS_NAME = "jobs.jsonl"

_BLOCK_BYTES = 1 << 20
_MAX_LIST_BYTES = 256 << 20
# The end of the year 9998, in seconds since the epoch, so that it is no later in any time zone.
_LATEST_S = 253370764800


@dataclass(frozen=True)
class Description:
    """What a backup is: its format, who wrote it when, and the id of its registry.

    `url` is where the registry is if it is in object storage, and so not in the backup, except for its id.
    """

    format: int
    written_by: str
    created_at: float
    registry: str
    url: str = ""


class Writer:
    """Writes a backup into a stream, member by member; the end of its block completes it."""

    def __init__(self, stream: BinaryIO, registry: str, url: str = "") -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._hashes: dict[str, str] = {}
        description = Description(FORMAT, f"gptloop {metadata.version('gptloop')}", time.time(), registry, url)
        self.add_bytes(DESCRIPTION_NAME, json.dumps(asdict(description)).encode())

    def add_bytes(self, name: str, content: bytes) -> None:
        """Adds a member with some content."""
        self._add(name, BytesIO(content), len(content), time.time())

    def add_file(self, name: str, file: BinaryIO) -> None:
        """Adds an open file as it is now: what is appended to it later is left out."""
        found = os.fstat(file.fileno())
        self._add(name, file, found.st_size, found.st_mtime)

    def _add(self, name: str, file: IO[bytes], size_bytes: int, modified_at: float) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = size_bytes, modified_at, 0o644
        hashed = _Hashed(file)
        self._tar.addfile(member, hashed)
        self._hashes[name] = hashed.digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.add_bytes(HASHES_NAME, json.dumps(self._hashes).encode())
            self._tar.close()
        else:
            # What the tar still holds cannot be written where writing has failed.
            with suppress(OSError):
                self._tar.__exit__(kind, None, None)


class _Hashed:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self._sha256.update(block)
        return block

    def digest(self) -> str:
        return self._sha256.hexdigest()


def extract(path: Path, folder: Path) -> tuple[Description, str]:
    """Writes the members of a backup into an empty folder, synced, and compares each with its hash.

    Returns its description and the hash of its list. Raises `FailedPrecondition` if the file is damaged, cut off, of a
    newer format, or has a member that does not belong into a backup; what was written then has no value.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            return _extract(_members(tar), folder)
    except KeyError as error:
        raise FailedPrecondition(f"{shown(path)} cannot be restored: it has no {error}.") from None
    except (tarfile.TarError, EOFError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise FailedPrecondition(f"{shown(path)} cannot be restored: {excerpt(error, 160)}.") from None


def _extract(members: Iterator[tuple[str, IO[bytes], float]], folder: Path) -> tuple[Description, str]:
    name, content, _ = next(members, ("", BytesIO(), 0.0))
    if name != DESCRIPTION_NAME:
        raise ValueError("it is not a backup of gptloop")
    hashed = _Hashed(content)
    description = _described(hashed.read(_MAX_LIST_BYTES))
    hashes = {DESCRIPTION_NAME: hashed.digest()}
    for name, content, modified_at in members:
        if name == HASHES_NAME:
            listed = content.read(_MAX_LIST_BYTES)
            if json.loads(listed) != hashes or next(members, None) is not None:
                raise ValueError("it is damaged, because its files differ from the list of their hashes")
            if JOBS_NAME not in hashes:
                raise KeyError(JOBS_NAME)
            return description, hashlib.sha256(listed).hexdigest()
        if name in hashes:
            raise ValueError(f"it has {shown(name)} twice")
        hashes[name] = _write(folder / name, content, modified_at)
    raise ValueError("it is cut off, because the list of hashes at its end is missing")


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes], float]]:
    for member in tar:
        content = tar.extractfile(member) if member.isreg() and not member.issparse() else None
        if content is None or not _belongs(member.name):
            raise ValueError(f"it has {shown(member.name)}, which `gptloop backup` would not write")
        yield member.name, content, member.mtime


def _belongs(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if str(PurePosixPath(name)) != name or ".." in parts or "\0" in name:
        return False
    return name in (DESCRIPTION_NAME, HASHES_NAME, JOBS_NAME) or any(name.startswith(f"{each}/") for each in FOLDERS)


def _described(text: bytes) -> Description:
    values = json.loads(text)
    if type(values) is not dict or type(values["format"]) is not int:
        raise ValueError("its description is not one that `gptloop backup` writes")
    if values["format"] > FORMAT:
        raise ValueError(
            f"it was written by a newer gptloop ({shown(values['written_by'], 40)}), in format {values['format']}, and "
            f"this one reads formats up to {FORMAT}"
        )
    values.setdefault("url", "")  # of an older program
    for name, kinds in (("written_by", (str,)), ("registry", (str,)), ("url", (str,)), ("created_at", (int, float))):
        if type(values[name]) not in kinds:
            raise ValueError(f"{name} is {shown(values[name], 40)} in its description")
    if not 0 < values["created_at"] < _LATEST_S:
        raise ValueError(f"created_at is {values['created_at']:.3g} in its description, which is no time")
    return Description(**values)


def _write(path: Path, content: IO[bytes], modified_at: float) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    hashed = _Hashed(content)
    with path.open("xb") as file:
        while block := hashed.read(_BLOCK_BYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    os.utime(path, (modified_at, modified_at))
    return hashed.digest()
