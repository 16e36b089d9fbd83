"""Second names for folders, for programs that do not understand every path.

Unix sockets take about a hundred bytes. MLX hands paths to a shell in double quotes, and PATH is split at colons.
"""

import fcntl
import hashlib
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from shared.errors import FailedPrecondition

# macOS allows 103 bytes for a socket: this leaves room for its own name, and for a temporary one while it is made.
_MAX_LENGTH_BYTES = 74
# Not the folder that TMPDIR names: it differs among the processes.
_PLACE = Path("/tmp")
_PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")


def plain_path(folder: Path) -> Path:
    """A path of letters, digits, `.`, `_`, `+` and `-`: the folder's own, else a link below /tmp.

    Every process derives the same link. It is made if the folder exists, so call this again once you have made the
    folder. Raises `FailedPrecondition` if another user made the place of the links.
    """
    return folder if _PLAIN.fullmatch(str(folder)) else _link(folder)


def socket_folder(folder: Path) -> Path:
    """The same for a folder with a unix socket in it, whose path is short too."""
    return plain_path(folder) if len(os.fsencode(folder)) <= _MAX_LENGTH_BYTES else _link(folder)


def _link(folder: Path) -> Path:
    links = _PLACE / f"gptloop-{os.getuid()}"
    link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    if folder.is_dir():
        links.mkdir(mode=0o700, exist_ok=True)
    if links.is_symlink() or links.exists():
        _hold(links)
    if folder.is_dir() and not link.is_dir():
        for other in links.iterdir():
            if not other.exists():
                other.unlink(missing_ok=True)
        # Another process may make it in the same moment.
        with suppress(FileExistsError):
            link.symlink_to(folder)
    return link


@cache
def _hold(links: Path) -> int:
    """Locks the links until this process ends: systemd-tmpfiles removes nothing old from a folder that is locked."""
    status = links.lstat()
    if links.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise FailedPrecondition(f"{links} must be a folder that only you can write, but it is not: remove it.")
    descriptor = os.open(links, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
