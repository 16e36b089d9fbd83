"""Replaces itself with a program that holds a lock while it runs: `python -m deploy.launch LOCK PROGRAM [ARGUMENT …]`.

The lock is held until the program and all processes that it left behind have ended. Its file contains the pid.
"""

import fcntl
import os
import sys
from pathlib import Path

# supervisord closes all file descriptors from 5 on when it starts, so the lock must have a lower one.
_DESCRIPTOR = 3


def launch(lock: Path, command: list[str]) -> None:
    """Waits for the lock, writes the pid into its file and replaces this process with the program."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    if opened != _DESCRIPTOR:
        os.dup2(opened, _DESCRIPTOR)
        os.close(opened)
    fcntl.flock(_DESCRIPTOR, fcntl.LOCK_EX)
    os.ftruncate(_DESCRIPTOR, 0)
    os.write(_DESCRIPTOR, str(os.getpid()).encode())
    os.set_inheritable(_DESCRIPTOR, True)
    os.execvp(command[0], command)


def holder(lock: Path) -> int | None:
    """Returns the pid of the program that was launched with a lock, or `None` if nothing holds the lock."""
    try:
        with lock.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int(lock.read_text() or 0)
    return None


if __name__ == "__main__":
    launch(Path(sys.argv[1]), sys.argv[2:])
