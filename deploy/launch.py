"""Replaces itself with a program that holds a lock while it runs: `python -m deploy.launch LOCK PROGRAM [ARGUMENT …]`.

The lock is held until the program and all processes that it left behind have ended. Its file contains the pid.
"""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import argparse
import fcntl
import os
from pathlib import Path

# supervisord closes all file descriptors from 5 on when it starts, so the lock must have a lower one.
_DESCRIPTOR = 3


def launch(lock: Path, program: str, arguments: list[str]) -> None:
    """Waits for the lock, writes the pid into its file and replaces this process with the program."""
    opened = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    if opened != _DESCRIPTOR:
        os.dup2(opened, _DESCRIPTOR)
        os.close(opened)
    fcntl.flock(_DESCRIPTOR, fcntl.LOCK_EX)
    os.ftruncate(_DESCRIPTOR, 0)
    os.write(_DESCRIPTOR, str(os.getpid()).encode())
    os.set_inheritable(_DESCRIPTOR, True)
    os.execvp(program, [program, *arguments])


def holder(lock: Path) -> int | None:
    """Returns the pid of the program that was launched with a lock, or `None` if nothing holds the lock."""
    try:
        opened = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(opened, 32) or 0)
    finally:
        os.close(opened)
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m deploy.launch", description=__doc__)
    parser.add_argument("lock", type=Path)
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    launch(given.lock, given.program, given.arguments)
