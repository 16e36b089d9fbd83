"""Starts, queries and stops supervisord, and finds the programs that a killed supervisord left behind."""

import http.client
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

from supervisor.xmlrpc import SupervisorTransport

from deploy.launch import holder
from shared.errors import Unavailable
from shared.plain_paths import socket_folder
from shared.service.settings import Directories

_ROOT = Path(__file__).parent.parent
# supervisord runs in the folder of state, which holds no code.
_COMMAND = 'cd "$GPTLOOP_VAR" && exec "$GPTLOOP_PYTHON" -P -m supervisor.supervisord --configuration "$1"'

# Longer than the sum of all waits in the configuration.
_STOP_LIMIT_S = 190.0
# A program without its supervisord gets the longest wait of the configuration.
_ORPHAN_LIMIT_S = 75.0
_START_LIMIT_S = 20.0
_POLL_S = 0.1


@dataclass(frozen=True)
class ProcessState:
    """A program: its state as supervisord names it (`RUNNING`, `STARTING`, `FATAL`, …) and how long it has run."""

    name: str
    state: str
    pid: int | None = None
    uptime_s: int | None = None


class Supervisor:
    """supervisord with a configuration. Its files are in the folders `run` and `log` of the state.

    configuration: a supervisord.conf. Its variables `%(ENV_…)s` come from the environment, and its paths are relative
        to the folder of state.
    environment: the variables of its programs; `GPTLOOP_VAR` and those that the configuration needs are added.
    """

    def __init__(self, configuration: Path, directories: Directories, environment: Mapping[str, str]) -> None:
        self._configuration = configuration
        self._run = directories.var / "run"
        self._lock = self._run / "supervisord.lock"
        self._log = directories.log
        self._environment = {
            **environment,
            "GPTLOOP_VAR": str(directories.var),
            "GPTLOOP_ROOT": str(_ROOT),
            "GPTLOOP_PYTHON": sys.executable,
            "GPTLOOP_SUPERVISOR_SOCKET": str(self._socket()),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts supervisord in its own session, so that a Ctrl-C in this terminal does not reach it."""
        assert not self.is_running()
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._log.mkdir(parents=True, exist_ok=True)
        # If the socket needs a link, its folder must exist first.
        self._socket()
        supervisord = ["/bin/sh", "-c", _COMMAND, "sh", str(self._configuration)]
        with (self._log / "supervisord.out").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.launch", str(self._lock), *supervisord],
                cwd=_ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        """Whether supervisord runs, whichever process started it."""
        return holder(self._lock) is not None

    def wait_for_answer(self) -> None:
        """Returns when supervisord answers; raises `Unavailable` with its output if it does not."""
        assert self._process is not None
        deadline_s = time.monotonic() + _START_LIMIT_S
        while True:
            with suppress(Unavailable):
                self.processes()
                return
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise Unavailable("supervisord does not start: " + " ".join(self.last_lines("supervisord", 5)))
            time.sleep(_POLL_S)

    def processes(self) -> list[ProcessState]:
        """Returns every program; raises `Unavailable` if supervisord does not answer."""
        proxy = ServerProxy("http://127.0.0.1", SupervisorTransport(None, None, f"unix://{self._socket()}"))
        try:
            answers: Any = proxy.supervisor.getAllProcessInfo()
        except (OSError, http.client.HTTPException, Fault) as error:
            raise Unavailable(f"supervisord does not answer: {error}.") from None
        finally:
            proxy("close")()
        return [
            ProcessState(answer["name"], answer["statename"], answer["pid"], max(0, answer["now"] - answer["start"]))
            for answer in answers
        ]

    def orphans(self) -> dict[str, int]:
        """Returns the name and pid of each program that runs without supervisord."""
        if self.is_running():
            return {}
        locks = {lock.stem: holder(lock) for lock in self._run.glob("*.lock")}
        return {name: pid for name, pid in locks.items() if pid is not None}

    def stop(self) -> None:
        """Ends supervisord and every program, also those of a killed supervisord; returns when all are gone.

        Raises `Unavailable` if supervisord does not end.
        """
        if self._process is not None:
            # It may not hold its lock yet.
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_LIMIT_S)
        if not _ends(self._lock, signal.SIGTERM, _STOP_LIMIT_S):
            raise Unavailable(
                f"supervisord (pid {holder(self._lock)}) does not end; {self._log}/supervisord.log may say why."
            )
        # In this order the worker ends before Redis, which still receives its last events.
        for name in sorted(self.orphans(), reverse=True):
            lock = self._run / f"{name}.lock"
            if not _ends(lock, signal.SIGTERM, _ORPHAN_LIMIT_S):
                _ends(lock, signal.SIGKILL, _ORPHAN_LIMIT_S)

    def last_lines(self, name: str, count: int) -> list[str]:
        """Returns the last lines of a program's log."""
        files = (self._log / f"{name}.log", self._log / f"{name}.out")
        texts = [file.read_text(errors="replace") for file in files if file.exists()]
        return "".join(texts).splitlines()[-count:]

    def _socket(self) -> Path:
        return socket_folder(self._run) / "supervisor.sock"


def _ends(lock: Path, number: signal.Signals, limit_s: float) -> bool:
    """Sends a signal to the program that holds a lock, and returns whether it ends within the limit."""
    # The pid is 0 while the program has not written it yet. A signal to 0 would reach this process's own group.
    if pid := holder(lock):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return wait_until(lambda: holder(lock) is None, limit_s)


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Returns true as soon as the condition holds, and false if it does not within the limit."""
    deadline_s = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(_POLL_S)
    return True
