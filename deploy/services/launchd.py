"""Agents of launchd, which run while their user is logged in."""

import plistlib
import shlex
from pathlib import Path
from typing import Any

from deploy.services.installation import PROCESSES, Installation, Process
from shared.service.settings import Environment, read_str


class Launchd:
    """Writes an agent for each process. launchd does not limit logs, so `deploy.log_file` writes them."""

    name = "launchd"
    program = "launchctl"
    start = "launchctl bootstrap gui/$(id -u) ~/Library/LaunchAgents/gptloop.*.plist"
    # The worker first, while Redis still takes its last state.
    stop = "for name in worker inference trainer redis; do launchctl bootout gui/$(id -u)/gptloop.$name; done"
    hint = "The services run while you are logged in, and start at each login."

    def __init__(self, environment: Environment) -> None:
        self._folder = Path(read_str(environment, "HOME", str(Path.home()))) / "Library" / "LaunchAgents"

    def files(self, installation: Installation) -> dict[Path, bytes]:
        """Returns every file of the services, with its contents."""
        return {
            self._path(process): plistlib.dumps(_agent(installation, process)) for process in installation.processes
        }

    def installed(self) -> list[Path]:
        """Returns the files of services that exist."""
        return [path for path in map(self._path, PROCESSES) if path.exists()]

    def settings(self, contents: bytes) -> dict[str, str]:
        """Returns the variables in the contents of the file of an agent; none if it is not one."""
        try:
            return dict(plistlib.loads(contents)["EnvironmentVariables"])
        except (ValueError, LookupError, TypeError):
            return {}

    def is_running(self) -> bool:
        """Whether this user has a launchd, which every macOS has."""
        return True

    def logs(self, folder: Path) -> str:
        """Returns the command that shows the logs in their folder."""
        return f"tail -F {shlex.quote(str(folder))}/*.log"

    def _path(self, process: Process) -> Path:
        return self._folder / f"{_label(process)}.plist"


def _label(process: Process) -> str:
    return f"gptloop.{process.name}"


def _agent(installation: Installation, process: Process) -> dict[str, Any]:
    log = installation.directories.log / process.name
    writer = (installation.python, "-m", "deploy.log_file", f"{log}.log")
    return {
        "Label": _label(process),
        "ProgramArguments": installation.command(process, *writer),
        "WorkingDirectory": str(installation.root),
        "EnvironmentVariables": dict(installation.environment),
        "RunAtLoad": True,
        "KeepAlive": True,
        "ExitTimeOut": process.stop_s,
        # A background process would run on the slow cores only.
        "ProcessType": "Standard" if process.gives_way else "Interactive",
        "LowPriorityIO": process.gives_way,
        # What is printed before the writer of the log has started.
        "StandardOutPath": f"{log}.out",
        "StandardErrorPath": f"{log}.out",
    }
