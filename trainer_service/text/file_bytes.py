"""Reads the bytes and the UTF-8 text of a regular file, decompressed, and detects changes of the file."""

import codecs
import gzip
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from shared.errors import DataError, InvalidArgument, NotFound, shown
from trainer_service.text import zstd

CHUNK_BYTES = 1 << 18
COMPRESSED = (".gz", ".zst")
# The first bytes of files that are not UTF-8 text; longer marks come first.
_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32 text: convert it, as with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32 text: convert it, as with iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16 text: convert it, as with iconv -f UTF-16 -t UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text: convert it, as with iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed by gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: let its name end in .zst",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"%PDF": "a PDF document: extract its text",
}
_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class _Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Returns at most `size` bytes, none at the end."""


class Identity(NamedTuple):
    """The part of a file's status that changes when the file is written or replaced."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """Takes the identity from a file's status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def identify(path: Path) -> Identity:
    """Returns the identity of a regular file without opening it.

    Raises `NotFound`, `InvalidArgument` or `DataError`.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise NotFound(f"The file {_name(path)} does not exist.") from None
    except OSError as error:
        raise DataError(f"The file {_name(path)} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a name with a NUL
        raise InvalidArgument(f"{_name(path)} is not a valid file name: {error}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise InvalidArgument(f"{_name(path)} is a folder; name the files in it.")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of another kind")
        raise InvalidArgument(
            f"{_name(path)} is {kind}, but must be a regular file, because text is read more than once."
        )
    return Identity.of(status)


@contextmanager
def open_bytes(path: Path, identity: Identity, on_read: Callable[[int], None]) -> Iterator[BinaryIO]:
    """Opens a file for reading its raw bytes. Each read passes the number of bytes to `on_read`, and raises `DataError`
    if the file has changed since it was identified."""
    try:
        # Non-blocking, because a pipe may have replaced the file.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"The file {_name(path)} no longer exists.") from None
    except OSError as error:
        raise DataError(f"The file {_name(path)} cannot be read: {error.strerror}.") from None
    with io.BufferedReader(_WatchedFile(descriptor, path, identity, on_read), CHUNK_BYTES) as file:
        yield file


class _WatchedFile(io.RawIOBase):
    """A file whose reads fail once its identity has changed."""

    def __init__(self, descriptor: int, path: Path, identity: Identity, on_read: Callable[[int], None]) -> None:
        self._descriptor = descriptor
        self._path = path
        self._identity = identity
        self._on_read = on_read

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def readinto(self, buffer: Any) -> int:
        # The status is taken after the read, so that it covers every byte that was read.
        try:
            count = os.readv(self._descriptor, [buffer])
            now = Identity.of(os.fstat(self._descriptor))
        except OSError as error:
            raise DataError(f"The file {_name(self._path)} cannot be read: {error.strerror}.") from None
        if now != self._identity:
            raise DataError(
                f"The file {_name(self._path)} changed while it was read. Start again when nothing writes to it."
            )
        self._on_read(count)
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def content(path: Path, identity: Identity, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """Yields the content of a file in chunks, decompressed if its name ends in .gz or .zst, in bounded memory."""
    with open_bytes(path, identity, on_read) as file, _decompressed(file, path, identity.size_bytes) as plain:
        while True:
            try:
                chunk = plain.read(CHUNK_BYTES)
            except (OSError, EOFError, zlib.error) as error:
                reason = shown(str(error), 100)
                raise DataError(f"The file {_name(path)} is damaged or cut off: {reason}.") from None
            if not chunk:
                return
            on_read(0)  # a few compressed bytes can give many chunks
            yield chunk


@contextmanager
def _decompressed(file: BinaryIO, path: Path, size_bytes: int) -> Iterator[_Readable]:
    match path.suffix.lower():
        case ".gz":
            with gzip.open(file) as plain:
                yield plain
        case ".zst":
            # Loading pyarrow takes about a second, so only reading .zst loads it.
            import pyarrow  # type: ignore[import-untyped]

            if not zstd.is_whole(file, size_bytes):
                raise DataError(
                    f"The file {_name(path)} is damaged or cut off: it does not end with a whole zstd frame."
                )
            file.seek(0)
            with pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd") as plain:
                yield plain
        case _:
            yield file


def text(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    """Yields the text of UTF-8 bytes, without a byte order mark and with "\\n" as line ends; raises `DataError` if the
    bytes are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    position_bytes = 0
    beginning = b""
    begun = False
    for chunk in chain(chunks, [b""]):
        if len(beginning) < 4:
            beginning += chunk[:1024]
        if position_bytes == 0 and chunk.count(0) > len(chunk) // 8:
            raise DataError(_not_utf8(path, beginning, "it has many NUL bytes", chunk))
        pending_bytes = len(decoder.getstate()[0])
        try:
            decoded = newlines.decode(decoder.decode(chunk, final=not chunk), final=not chunk)
        except UnicodeDecodeError as error:
            at = position_bytes - pending_bytes + error.start
            raise DataError(_not_utf8(path, beginning, f"byte {at} is invalid", chunk)) from None
        position_bytes += len(chunk)
        if decoded:
            yield decoded if begun else decoded.removeprefix("\ufeff")
            begun = True


def _not_utf8(path: Path, beginning: bytes, finding: str, chunk: bytes) -> str:
    for mark, kind in _BEGINNINGS.items():
        if beginning.startswith(mark):
            return f"The file {_name(path)} is not UTF-8 text: it looks like {kind}."
    if b"\0" not in chunk:
        advice = "If it is Latin-1 or Windows-1252, convert it, as with iconv -f WINDOWS-1252 -t UTF-8"
    elif 0 in (chunk[::2].count(0), chunk[1::2].count(0)):
        advice = "If it is UTF-16, convert it, as with iconv -f UTF-16LE -t UTF-8"
    else:
        advice = "It does not look like text"
    return f"The file {_name(path)} is not UTF-8 text: {finding}. {advice}."


def _name(path: Path) -> str:
    return shown(str(path))
