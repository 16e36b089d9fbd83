"""Installs the services for the service manager of this machine, and knows which folder of state they run."""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.launch import holder
from deploy.services.installation import PROCESSES, Installation
from deploy.services.launchd import Launchd
from deploy.services.systemd import Systemd
from shared.atomic_file import replacing
from shared.errors import AlreadyExists, FailedPrecondition, shown
from shared.service.settings import Directories, Environment, read_directories

Manager = Launchd | Systemd


def manager_of(environment: Environment, platform: str = sys.platform) -> Manager:
    """Returns the service manager of a platform."""
    return Launchd(environment) if platform == "darwin" else Systemd(environment)


def install(manager: Manager, installation: Installation) -> list[Path]:
    """Writes the files of all services and removes those that an earlier call wrote for others; returns the files.

    Raises `FailedPrecondition` if `gptloop up` runs the processes or the service manager is absent, and
    `AlreadyExists` if services of another folder of state are installed.
    """
    if shutil.which(manager.program) is None:
        raise FailedPrecondition(
            f"There is no {manager.program} on PATH, so no {manager.name} that could run services; `gptloop up` starts "
            "the processes without it."
        )
    directories = installation.directories
    if holder(directories.var / "run" / "supervisord.lock") is not None:
        raise FailedPrecondition(f"`gptloop up` runs the processes of {directories.var}: run `gptloop down` first.")
    installed = installed_environment(manager).get("GPTLOOP_VAR", str(directories.var))
    if installed != str(directories.var):
        raise AlreadyExists(
            f"The services of another folder of state, {shown(installed, 150)}, are installed: `gptloop service "
            "uninstall` removes them. Only one folder has services; `gptloop up` runs others."
        )
    files = manager.files(installation)
    for folder in (directories.log, *{path.parent for path in files}):
        folder.mkdir(parents=True, exist_ok=True)
    for path, contents in files.items():
        with replacing(path) as file:
            file.write(contents)
    for path in manager.installed():
        # A link enables the services.
        if path not in files and not path.is_symlink():
            path.unlink()
    return list(files)


def uninstall(manager: Manager) -> list[Path]:
    """Removes the files of all services and returns them; raises `FailedPrecondition` if a process still runs."""
    environment = installed_environment(manager)
    if environment and (running := running_processes(read_directories(environment))):
        pids = ", ".join(f"{name} (pid {pid})" for name, pid in running.items())
        raise FailedPrecondition(f"The services still run: {pids}. Stop them first: {manager.stop}")
    files = manager.installed()
    for path in files:
        path.unlink()
    return files


def installed_environment(manager: Manager) -> dict[str, str]:
    """Returns the settings of the installed services; none if no services are installed."""
    files = (path for path in manager.installed() if path.is_file())
    return next(filter(None, (manager.settings(path.read_bytes()) for path in files)), {})


def running_processes(directories: Directories) -> Mapping[str, int]:
    """Returns the pid of each process that runs on a folder of state, by name."""
    pids = {process.name: holder(directories.var / "run" / f"{process.name}.lock") for process in PROCESSES}
    return {name: pid for name, pid in pids.items() if pid is not None}


def refuse_services(manager: Manager, directories: Directories) -> None:
    """Raises `FailedPrecondition` if services are installed for this folder of state."""
    if installed_environment(manager).get("GPTLOOP_VAR") == str(directories.var):
        raise FailedPrecondition(
            f"The services of {manager.name} run the processes of {directories.var}: `gptloop service status` shows "
            "them, and `gptloop service uninstall` removes them."
        )
