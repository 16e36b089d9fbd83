"""Reads the structure of a zstd archive: the decompressing library does not notice an archive that is cut off.

Source of the format: RFC 8878, section 3.1.
"""

import os
from dataclasses import dataclass
from typing import BinaryIO

_FRAME = 0xFD2FB528
_SKIPPABLE = 0x184D2A50
_RLE = 1


@dataclass(frozen=True)
class _FrameHeader:
    """The size of a frame's content, None if the header does not give it, and whether a checksum follows the blocks."""

    content_bytes: int | None
    has_checksum: bool


def is_whole(file: BinaryIO, size_bytes: int) -> bool:
    """Returns whether the last frame of an archive ends where the file ends; reads only the headers of its blocks."""
    file.seek(0)
    while (at := file.tell()) < size_bytes:
        magic = _number(file, 4)
        if magic & ~0xF == _SKIPPABLE:
            file.seek(_number(file, 4), os.SEEK_CUR)
        elif magic == _FRAME:
            _skip_frame(file, size_bytes)
        else:
            return False
        if file.tell() == at:
            return False
    return size_bytes > 0 and file.tell() == size_bytes


def content_bytes(file: BinaryIO) -> int | None:
    """Returns the decompressed size of an archive's first frame, or None if its header does not give it."""
    file.seek(0)
    return _read_header(file).content_bytes if _number(file, 4) == _FRAME else None


def _read_header(file: BinaryIO) -> _FrameHeader:
    descriptor = _number(file, 1)
    is_single_segment = descriptor >> 5 & 1
    length = (is_single_segment, 2, 4, 8)[descriptor >> 6]
    dictionary_id = (0, 1, 2, 4)[descriptor & 3]
    file.seek((1 - is_single_segment) + dictionary_id, os.SEEK_CUR)
    size = _number(file, length) + (256 if length == 2 else 0)
    return _FrameHeader(size if length else None, has_checksum=bool(descriptor >> 2 & 1))


def _skip_frame(file: BinaryIO, size_bytes: int) -> None:
    header = _read_header(file)
    last = False
    while not last and file.tell() < size_bytes:
        block = _number(file, 3)
        last = bool(block & 1)
        file.seek(1 if block >> 1 & 3 == _RLE else block >> 3, os.SEEK_CUR)
    if not last:
        file.seek(size_bytes + 1)  # the frame continues beyond the end of the file
    elif header.has_checksum:
        file.seek(4, os.SEEK_CUR)


def _number(file: BinaryIO, length: int) -> int:
    return int.from_bytes(file.read(length), "little")
