"""A real `systemd --user`, and what launchd does with the files of its agents."""

import os
import plistlib
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from deploy.services.launchd import Launchd
from tests.waiting import HANG_S, wait_until

# It runs only on a machine that was booted with systemd, which a folder in /run shows. Nobody else sees this one.
_BOOTED = 'mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec "$0" --user'
_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")


class UserManager:
    """A `systemd --user` with a home of its own; `why_not` says why it does not run."""

    def __init__(self, home: Path) -> None:
        self.why_not = ""
        program = next(filter(os.path.exists, _SYSTEMD), None)
        if program is None:
            self.why_not = "systemd is not installed"
            return
        # The path of its socket must be short.
        self._runtime = Path(tempfile.mkdtemp(prefix="gptloop-systemd-"))
        self._log = self._runtime / "log"
        self.environment = {"HOME": str(home), "XDG_RUNTIME_DIR": str(self._runtime)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "/bin/sh", "-c", _BOOTED, program],
                env=os.environ | self.environment | {"SYSTEMD_LOG_TARGET": "console"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: (self._runtime / "systemd/private").exists() or self._process.poll() is not None)
        if self._process.poll() is not None:
            self.why_not = f"systemd --user does not run here: {self._log.read_text().strip() or 'it says nothing'}"

    def run(self, command: str) -> str:
        """Runs a command of the shell for this manager and returns its output."""
        ended = subprocess.run(
            ["/bin/sh", "-c", command],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert ended.returncode == 0, (command, ended.stderr, self._log.read_text())
        return ended.stdout

    def end(self) -> None:
        """Ends it with everything that it started."""
        if not self.why_not:
            self.run("systemctl --user exit")
            self._process.wait(HANG_S)
            shutil.rmtree(self._runtime)


class Agents:
    """Runs the agents in a folder as launchd does, but starts none again."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._running: dict[str, tuple[dict[str, Any], subprocess.Popen[bytes]]] = {}

    def start(self) -> None:
        """Starts every agent that runs at load."""
        for path in (self._home / "Library/LaunchAgents").glob("*.plist"):
            agent = plistlib.loads(path.read_bytes())
            assert agent["RunAtLoad"] and agent["KeepAlive"]
            assert agent["Label"] == path.name.removesuffix(".plist")
            paths = [Path(agent[f"Standard{each}Path"]) for each in ("Out", "Error")]
            with paths[0].open("ab") as out, paths[1].open("ab") as error:
                process = subprocess.Popen(
                    agent["ProgramArguments"],
                    cwd=agent["WorkingDirectory"],
                    env={"HOME": str(self._home), "PATH": "/usr/bin:/bin"} | agent["EnvironmentVariables"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=error,
                    start_new_session=True,
                )
            self._running[agent["Label"]] = agent, process

    def stop(self) -> dict[str, int]:
        """Ends every agent as `launchctl bootout` does, in the order that gptloop prints; returns their exit codes."""
        codes = {}
        words = Launchd.stop.partition(" in ")[2].partition(";")[0].split()
        for label in [f"gptloop.{name}" for name in words]:
            if label not in self._running:
                continue
            agent, process = self._running.pop(label)
            process.send_signal(signal.SIGTERM)
            try:
                codes[label] = process.wait(agent["ExitTimeOut"])
            except subprocess.TimeoutExpired:
                process.kill()
                codes[label] = process.wait()
            # What is left of its process group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return codes
