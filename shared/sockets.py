"""Unix sockets, whose paths the system keeps to about a hundred bytes."""

import hashlib
import os
from pathlib import Path

from shared.errors import FailedPrecondition

# macOS allows 103 bytes; a server may need a few more for a temporary name.
_MAX_LENGTH_BYTES = 90


def short_socket_path(path: Path) -> Path:
    """The path itself, or where it is too long one below /tmp that every process derives from it alike."""
    if len(os.fsencode(path)) <= _MAX_LENGTH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    # Not the folder that TMPDIR names: it differs among the processes.
    return Path("/tmp") / f"gptloop-{os.getuid()}-{digest}" / path.name


def make_socket_folder(socket: Path) -> None:
    """Makes the folder of a socket, for this user only; raises `FailedPrecondition` where it is another user's."""
    socket.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = socket.parent.lstat()
    if status.st_uid != os.getuid() or socket.parent.is_symlink():
        raise FailedPrecondition(f"{socket.parent} must be a folder of yours, but somebody else made it: remove it.")
    socket.parent.chmod(0o700)
