"""Plain second names for folders, for programs that do not accept every path.

The path of a unix socket has at most about a hundred bytes. MLX, where it compiles, passes paths to a shell in double
quotes, and PATH is split at colons.
"""

import fcntl
import hashlib
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from shared.errors import FailedPrecondition

# macOS allows 103 bytes for a socket. This leaves room for its name, and for a temporary name while it is created.
_MAX_LENGTH_BYTES = 74
# Not the folder in TMPDIR, which differs between the processes.
_PLACE = Path("/tmp")
_PLAIN = re.compile(r"[A-Za-z0-9/._+-]+")


def plain_path(folder: Path) -> Path:
    """Returns a path of letters, digits, `.`, `_`, `+` and `-`: the folder's own path, or else a link below /tmp.

    Every process gets the same link. It is created only if the folder exists; if it does not, call this again after
    creating it. Raises `FailedPrecondition` if another user owns the folder of the links.
    """
    return folder if _PLAIN.fullmatch(str(folder)) else _link(folder)


def socket_folder(folder: Path) -> Path:
    """Does the same for the folder of a unix socket, and also replaces a path that is too long."""
    return plain_path(folder) if len(os.fsencode(folder)) <= _MAX_LENGTH_BYTES else _link(folder)


def _link(folder: Path) -> Path:
    links = _PLACE / f"gptloop-{os.getuid()}"
    link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    is_needed = folder.is_dir()
    if is_needed:
        links.mkdir(mode=0o700, exist_ok=True)
    if links.is_symlink() or links.exists():
        _hold(links)
    if is_needed and not link.is_dir():
        for other in links.iterdir():
            if not other.exists():
                other.unlink(missing_ok=True)
        # Another process may create it at the same time.
        with suppress(FileExistsError):
            link.symlink_to(folder)
    return link


@cache
def _hold(links: Path) -> int:
    """Locks the folder of the links until this process ends, so that systemd-tmpfiles does not remove old links."""
    status = links.lstat()
    if links.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise FailedPrecondition(f"{links} must be a folder that only you can write to, but it is not; remove it.")
    descriptor = os.open(links, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
