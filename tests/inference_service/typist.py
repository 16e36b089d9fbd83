"""A command in a pseudo-terminal of its own, at which a test types."""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from tests.inference_service.process import ROOT
from tests.waiting import HANG_S, wait_until

CTRL_C = "\x03"
CTRL_D = "\x04"
CTRL_R = "\x12"
UP = "\x1b[A"

# Makes the pseudo-terminal the one from which signals come, then runs the command.
_TAKE_OVER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
_SEQUENCE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07|[=>78])")


class Typist:
    """A command at a terminal of 80 by 24 cells; what it shows is collected in `shown`."""

    def __init__(self, *arguments: str, environment: Mapping[str, str]) -> None:
        self._terminal, other = os.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_OVER, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment, "TERM": "xterm"},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
        )
        os.close(other)
        self._bytes = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        os.close(self._terminal)

    @property
    def shown(self) -> str:
        """All that was shown, without colours and movements of the cursor."""
        return _SEQUENCE.sub("", self._bytes.decode(errors="replace")).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def see(self, text: str, times: int = 1) -> None:
        """Returns when a text has been shown `times` times."""
        wait_until(lambda: self.shown.count(text) >= times, lambda: not self._reader.is_alive())

    def end(self) -> int:
        """Returns the exit code of the command, which ends by itself."""
        code = self._process.wait(HANG_S)
        self._reader.join()
        return code

    def _read(self) -> None:
        while True:
            try:
                new = os.read(self._terminal, 4096)
            except OSError:  # Linux's way to say that the command has ended
                return
            if not new:
                return
            self._bytes += new
            # An editor asks where the cursor is, to know how much room there is below it.
            os.write(self._terminal, b"\x1b[1;1R" * new.count(b"\x1b[6n"))
