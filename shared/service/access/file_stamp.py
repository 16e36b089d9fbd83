"""Notices that a file has changed."""

from pathlib import Path


def stamp_of(path: Path) -> tuple[int, ...] | None:
    """Returns a value that changes if a file, also one behind links, is replaced or written; None if there is none."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    # The time of the last change of the inode also shows that a file has become readable.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
