"""Whether a zstd archive is whole: the library that decompresses it says nothing about one that is cut off.

Source of the format: RFC 8878, section 3.1.
"""

import os
from typing import BinaryIO

_FRAME = 0xFD2FB528
_SKIPPABLE = 0x184D2A50
_RLE = 1


def is_whole(file: BinaryIO, size_bytes: int) -> bool:
    """Whether the last frame of an archive ends where the file does; reads the headers of all blocks alone."""
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


def _skip_frame(file: BinaryIO, size_bytes: int) -> None:
    descriptor = _number(file, 1)
    single = descriptor >> 5 & 1
    content_size = (single, 2, 4, 8)[descriptor >> 6]
    dictionary_id = (0, 1, 2, 4)[descriptor & 3]
    file.seek((1 - single) + dictionary_id + content_size, os.SEEK_CUR)
    last = False
    while not last and file.tell() < size_bytes:
        block = _number(file, 3)
        last = bool(block & 1)
        file.seek(1 if block >> 1 & 3 == _RLE else block >> 3, os.SEEK_CUR)
    if not last:
        file.seek(size_bytes + 1)  # it goes on behind the end
    elif descriptor >> 2 & 1:
        file.seek(4, os.SEEK_CUR)


def _number(file: BinaryIO, length: int) -> int:
    return int.from_bytes(file.read(length), "little")
