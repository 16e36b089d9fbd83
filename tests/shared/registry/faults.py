"""Controls `faults.c`: file operations that fail, that end the process, or that are logged."""

import ctypes
import errno
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faults.c")
# The exit code of a process that the library ends.
DEATH = 86

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="faults.c needs LD_PRELOAD on Linux.")


class Mode(Enum):
    """What the library does at the n-th operation."""

    COUNT = 0
    FAIL_ONCE = 1
    # This operation and all later ones fail.
    FAIL_ON = 2
    DIE = 3


@dataclass(frozen=True)
class Operation:
    """One completed operation: `create`, `write`, `truncate`, `sync`, `rename`, `link`, `mkdir` or `unlink`."""

    name: str
    inode: int
    offset: int
    path: Path
    target: Path
    data: bytes


class Faults:
    """The library, in a process that has it preloaded."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.faults_count.restype = ctypes.c_long
        self._library.faults_hit.restype = ctypes.c_char_p

    def arm(self, root: Path, mode: Mode, n: int = 0, error: int = errno.EIO) -> None:
        """Counts the operations below a folder from now on, and disturbs the n-th one, from 0 on."""
        self._library.faults_arm(str(root).encode(), ctypes.c_long(n), mode.value, error)

    def disarm(self) -> None:
        """Stops disturbing operations."""
        self._library.faults_disarm()

    def count(self) -> int:
        """Returns the number of operations since `arm`."""
        return int(self._library.faults_count())

    def hit(self) -> str:
        """Returns the name of the disturbed operation."""
        return bytes(self._library.faults_hit()).decode()

    @contextmanager
    def logged(self, root: Path, log: Path) -> Iterator[None]:
        """Logs every operation below a folder."""
        with log.open("wb") as file:
            self._library.faults_log(file.fileno())
            self.arm(root, Mode.COUNT)
            try:
                yield
            finally:
                self.disarm()
                self._library.faults_log(-1)


def build(folder: Path) -> Path:
    """Compiles the library."""
    library = folder / "faults.so"
    command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def read_log(log: Path) -> list[Operation]:
    """Reads the operations of a log, in their order."""
    operations, rest = [], log.read_bytes()
    while rest:
        line, _, rest = rest.partition(b"\n")
        name, inode, offset, size, path, target = line.decode().split("\t")
        data, rest = rest[: int(size)], rest[int(size) :]
        operations.append(Operation(name, int(inode), int(offset), Path(path), Path(target), data))
    return operations
