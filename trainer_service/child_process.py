"""Runs work in a process that the caller can end at any moment, and explains how a process ended."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from shared.errors import FailedPrecondition, shown
from trainer_service.text.background import INTERVAL_S, iterate


def last_line(command: Sequence[str], environment: Mapping[str, str], tick: Callable[[int], None], purpose: str) -> str:
    """Runs a command and returns the last line of its standard output.

    `tick` receives the number of lines so far, several times a second; an exception from it kills the process. If this
    process dies, the command finds that nobody reads its output (`shared/service/reader.py`). A signal to the group of
    this process does not reach the command. Raises `FailedPrecondition`, whose sentence begins with `purpose`, if the
    command fails.
    """
    lines = [""]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | environment,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in iterate(process.stdout, lambda: tick(len(lines) - 1)):
                lines.append(line)
            while process.poll() is None:
                tick(len(lines) - 1)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(INTERVAL_S)
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        if process.returncode:
            raise FailedPrecondition(
                f"{purpose}, because its process {describe_end(process.returncode, errors.read())}"
            )
    return lines[-1]


def describe_end(returncode: int, stderr: str) -> str:
    """Returns the end of a sentence about a process that failed, with the last line that it wrote to standard error."""
    if returncode == -signal.SIGKILL:
        how = "was killed by SIGKILL, perhaps because memory is short"
    elif returncode < 0:
        how = f"was killed by signal {-returncode}"
    else:
        how = f"ended with exit code {returncode}"
    last = f": {shown(stderr.strip().splitlines()[-1], 160)}" if stderr.strip() else ""
    return f"{how}{last}."
