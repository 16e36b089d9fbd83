"""Becomes another program while holding a lock that says it runs: `python -m deploy.launch LOCK PROGRAM [ARGUMENT …]`.

The lock lasts as long as the program and whatever process it left behind, however they end. Its file names the pid.
"""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import argparse
import fcntl
import os
from pathlib import Path

# The supervisor closes every file from 5 on when it starts, and so must find the lock below that.
_DESCRIPTOR = 3


def launch(lock: Path, program: str, arguments: list[str]) -> None:
    """Waits for the lock, writes the pid into its file, and executes the program in place of this one."""
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
    """The pid of the program that was launched with a lock, or `None` where neither it nor a child of it runs."""
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
