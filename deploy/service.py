"""Writes the services of launchd or systemd that keep the processes running: `gptloop service install`."""

import os
from typing import Annotated

import typer

from deploy.health import health_checks
from deploy.ports import page_url, read_ports
from deploy.services.installation import read_installation
from deploy.services.manager import Manager, install, installed_environment, manager_of, running_processes, uninstall
from deploy.stack import COLUMNS, ProcessStatus
from deploy.supervisor import ProcessState
from shared.errors import InvalidArgument, shown
from shared.service import cli
from shared.service.lists import JsonOption, print_list

app = cli.new_app(__doc__)


@app.command()
def service(
    action: Annotated[str, typer.Argument(help="install, uninstall or status.")],
    as_json: JsonOption = False,
) -> None:
    """Let launchd or systemd keep the processes running.

    launchd (macOS) or systemd (Linux) then starts them at each login, and restarts what dies.

    install writes a file for each process, with the settings of this call, and says how to start them. Repeat it to
    change a setting. uninstall removes the files. status shows every process and its health; its exit code is 0 if all
    are healthy, 1 if one is not, and 3 if nothing runs.

    \b
    Examples:
      gptloop service install
      GPTLOOP_INFERENCE_SLOTS=16 gptloop service install
      gptloop service status
    """
    manager = manager_of(os.environ)
    match action:
        case "install":
            _install(manager)
        case "uninstall":
            for path in (removed := uninstall(manager)):
                print(f"Removed {path}")
            if not removed:
                print("No services are installed.")
        case "status":
            statuses = service_statuses(manager)
            print_list(
                statuses,
                COLUMNS,
                as_json=as_json,
                empty="No service runs. Install them with `gptloop service install`.",
            )
            if not any(each.process.pid for each in statuses):
                raise typer.Exit(3)
            raise typer.Exit(0 if all(each.is_healthy for each in statuses) else 1)
        case _:
            raise InvalidArgument(f"ACTION is {shown(action)}, but must be install, uninstall or status.")


def _install(manager: Manager) -> None:
    installation = read_installation(os.environ)
    for path in install(manager, installation):
        print(f"Written {path}")
    if running_processes(installation.directories):
        print("\nThe processes keep their old settings until you stop and start them.")
    steps = {
        "Start": manager.start,
        "State": "gptloop service status",
        "Logs": manager.logs(installation.directories.log),
        "Stop": manager.stop,
        "Page": page_url(installation.environment, read_ports(installation.environment)),
    }
    print("", *(f"{name + ':':7}{text}" for name, text in steps.items()), "", manager.hint, sep="\n")
    if not manager.is_running():
        print(
            f"\n{manager.name} does not run for this user, so nothing can start the services yet. Log in on a machine "
            f"that {manager.name} has booted; containers are none. `gptloop service uninstall` and `gptloop up` start "
            "the processes without it."
        )


def service_statuses(manager: Manager) -> list[ProcessStatus]:
    """Returns the state of each installed service; none if no services are installed."""
    environment = installed_environment(manager)
    if not environment:
        return []
    installation = read_installation(environment)
    running = running_processes(installation.directories)
    states = {process.name: "RUNNING" if process.name in running else "STOPPED" for process in installation.processes}
    checks = health_checks(environment, installation.directories, read_ports(environment))
    return [
        ProcessStatus(ProcessState(name, states.get(name, "external"), running.get(name)), check())
        for name, check in checks.items()
    ]
