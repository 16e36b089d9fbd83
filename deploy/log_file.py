"""Replaces itself with a program whose output goes to a log of limited size: `python -m deploy.log_file LOG PROGRAM …`.

A process of its own writes the log. It ends when the program and all processes that it left behind have ended.
"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

# As in supervisord.conf.
_MAX_BYTES = 10_000_000
_BACKUPS = 3
_CHUNK_BYTES = 1 << 16


def launch(log: Path, command: list[str]) -> None:
    """Starts the process that writes the log, and replaces this process with the program."""
    log.parent.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    if os.fork() == 0:
        # In a session of its own, and not as a child of the program, which may wait for its children.
        os.setsid()
        if os.fork() == 0:
            os.close(writing)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            while chunk := os.read(reading, _CHUNK_BYTES):
                append(chunk, log)
        os._exit(0)
    os.wait()
    os.close(reading)
    for descriptor in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(writing, descriptor)
    os.close(writing)
    os.execvp(command[0], command)


def append(chunk: bytes, log: Path, max_bytes: int = _MAX_BYTES) -> None:
    """Appends to a log. A full one is renamed to `<log>.1` first, that one to `<log>.2`, and so on."""
    # A disk that fails costs lines of the log, not the program.
    with suppress(OSError):
        if log.exists() and log.stat().st_size + len(chunk) > max_bytes:
            _rotate(log)
        with log.open("ab", buffering=0) as file:
            file.write(chunk)


def _rotate(log: Path) -> None:
    names = [log, *(log.with_name(f"{log.name}.{number}") for number in range(1, _BACKUPS + 1))]
    for older, newer in zip(reversed(names), reversed(names[:-1]), strict=False):
        if newer.exists():
            newer.replace(older)


if __name__ == "__main__":
    launch(Path(sys.argv[1]), sys.argv[2:])
