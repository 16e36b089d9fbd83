"""Starts, shows and stops Redis, the trainer, its worker and the inference server: `gptloop up`."""

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from deploy.access import check_access, with_absolute_paths
from deploy.health import Health, health_checks
from deploy.ports import Ports, page_url, read_ports
from deploy.services.manager import manager_of, refuse_services
from deploy.supervisor import ProcessState, Supervisor
from shared.errors import FailedPrecondition, Unavailable
from shared.service import cli, interrupts
from shared.service.lists import Column, JsonOption, print_list
from shared.service.settings import Directories, read_directories
from shared.text import format_duration

_CONFIGURATION = Path(__file__).parent / "supervisord.conf"
_START_LIMIT_S = 120.0
_POLL_S = 0.2
_LOG_LINES = 20

app = cli.new_app(__doc__)


@dataclass(frozen=True)
class ProcessStatus:
    """A process as supervisord and its health check see it; supervisord does not know an external Redis."""

    process: ProcessState
    health: Health

    @property
    def is_healthy(self) -> bool:
        """Whether it runs and passes its health check."""
        return self.health.is_healthy and self.process.state in ("RUNNING", "external")

    @property
    def reason(self) -> str:
        """Says why it is not healthy."""
        return self.health.text if self.process.state in ("RUNNING", "external") else self.process.state.lower()


COLUMNS = (
    Column[ProcessStatus]("process", lambda each: each.process.name),
    Column[ProcessStatus]("state", lambda each: each.process.state),
    Column[ProcessStatus]("pid", lambda each: each.process.pid, rank=1, right=True),
    Column[ProcessStatus](
        "uptime",
        lambda each: each.process.uptime_s,
        lambda each: "" if each.process.uptime_s is None else format_duration(each.process.uptime_s),
        key="uptime_s",
        rank=2,
        right=True,
    ),
    Column[ProcessStatus]("health", lambda each: each.health.text, wraps=True),
    Column[ProcessStatus]("", lambda each: each.is_healthy, key="is_healthy"),
)


class Stack:
    """The processes of one folder of state.

    ports: where the services listen.
    environment: the variables of the processes; `REDIS_URL` in it replaces the embedded Redis.
    configuration: a supervisord.conf.
    checks: a health check for each of its programs, by name.
    worker_stop_s: how long the worker may take to end its training step before it is killed.
    """

    def __init__(
        self,
        directories: Directories,
        ports: Ports,
        environment: Mapping[str, str],
        configuration: Path = _CONFIGURATION,
        checks: Mapping[str, Callable[[], Health]] | None = None,
        worker_stop_s: int = 60,
    ) -> None:
        self._directories = directories
        self._ports = ports
        self._environment = environment
        self._has_redis = not environment.get("REDIS_URL", "").strip()
        self._checks = checks or health_checks(environment, directories, ports)
        self._supervisor = Supervisor(
            configuration,
            directories,
            {
                **with_absolute_paths(environment),
                **ports.to_environment(),
                "GPTLOOP_EMBEDDED_REDIS": str(self._has_redis).lower(),
                "GPTLOOP_WORKER_STOP_S": str(worker_stop_s),
            },
        )

    def up(self, report: Callable[[str], None]) -> str:
        """Starts everything, reports each process once, and returns a sentence when all of them are healthy.

        If anything ends it early, Ctrl-C too, nothing is left running. Raises `Unavailable` with the end of a log if a
        process fails or does not become healthy, `FailedPrecondition` if waiting cannot make it healthy, and
        `AlreadyExists` if a port is in use.
        """
        with self._alone():
            if self._supervisor.is_running():
                for status in self._statuses():
                    if not status.is_healthy:
                        raise FailedPrecondition(
                            f"Everything is up already, but {status.process.name} is not healthy ({status.reason}). "
                            "`gptloop status` shows more; `gptloop down` stops everything."
                        )
                return "Everything is up already. New settings apply after `gptloop down` and `gptloop up`."
            # A killed supervisord may have left programs behind.
            self._supervisor.stop()
            check_access(self._environment)
            self._ports.check_free(self._environment)
            # Otherwise each process finds out by itself, and is started again and again.
            self._directories.open_registry().store.id()
            if not self._has_redis and not (redis := self._checks["redis"]()).is_healthy:
                raise Unavailable(f"REDIS_URL is set, but its Redis cannot be used. {redis.text}")
            try:
                with _signals_deferred():
                    self._supervisor.start()
                self._wait_until_healthy(report)
            except BaseException:
                with _signals_deferred():
                    self._supervisor.stop()
                raise
            return "Everything is up."

    def down(self) -> bool:
        """Stops everything and returns when it is gone; false if nothing ran."""
        with self._alone():
            ran = self._supervisor.is_running() or bool(self._supervisor.orphans())
            self._supervisor.stop()
            return ran

    def is_up(self) -> bool:
        """Whether a supervisor runs here, whichever process started it."""
        return self._supervisor.is_running()

    def status(self) -> list[ProcessStatus] | None:
        """Every process, or `None` if nothing is up; raises `Unavailable` if programs run without their supervisor."""
        if self._supervisor.is_running():
            return list(self._statuses())
        orphans = self._supervisor.orphans()
        if orphans:
            remains = ", ".join(f"{name} (pid {pid})" for name, pid in orphans.items())
            raise Unavailable(
                f"The supervisor is gone, but its programs still run: {remains}. `gptloop down` ends them."
            )
        return None

    def _statuses(self) -> Iterator[ProcessStatus]:
        processes = {process.name: process for process in self._supervisor.processes()}
        if not self._has_redis:
            processes["redis"] = ProcessState("redis", "external")
        for name, check in self._checks.items():
            yield ProcessStatus(processes[name], check())

    def _wait_until_healthy(self, report: Callable[[str], None]) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        self._supervisor.wait_for_answer()
        started = set[str]()
        while True:
            for process in self._supervisor.processes():
                if process.state == "FATAL":
                    raise self._failure(process.name, "ends again and again")
            for status in self._statuses():
                name = status.process.name
                if status.process.state != "external" and name not in started:
                    # The reason that it is not ready yet would alarm people; the failure names it.
                    report(f"Starting {name}.")
                    started.add(name)
                if status.health.needs_change:
                    raise FailedPrecondition(f"{name} cannot be used, so everything was stopped. {status.health.text}")
                if not status.is_healthy:
                    break
            else:
                return
            if time.monotonic() > deadline_s:
                raise self._failure(name, f"is not healthy after {_START_LIMIT_S:.0f} s ({status.reason})")
            time.sleep(_POLL_S)

    def _failure(self, name: str, what: str) -> Unavailable:
        lines = "\n".join(self._supervisor.last_lines(name, _LOG_LINES))
        log = self._directories.log / f"{name}.log"
        return Unavailable(f"{name} {what}, so everything was stopped. The end of {log}:\n{lines}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        run = self._directories.var / "run"
        run.mkdir(parents=True, exist_ok=True)
        with (run / "command").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FailedPrecondition(
                    f"Another `gptloop up` or `gptloop down` is at work on {run.parent}."
                ) from None
            yield


@contextmanager
def _signals_deferred() -> Iterator[None]:
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


@app.command()
def up() -> None:
    """Start every process and return when all of them are healthy.

    The processes are Redis, the trainer, a worker and the inference server.

    \b
    Examples:
      gptloop up
      GPTLOOP_INFERENCE_PORT=50061 gptloop up
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    stack = _read_stack()
    console = Console()

    def report(text: str) -> None:
        if console.is_terminal:
            line.update(text)
        else:
            print(text, flush=True)

    try:
        with console.status("") as line:
            outcome = stack.up(report)
    except KeyboardInterrupt:
        print("Interrupted: what was started has been stopped.", file=sys.stderr)
        raise typer.Exit(interrupts.EXIT_CODE) from None
    print(f"{outcome}\nThe page: {page_url(os.environ, read_ports(os.environ))}")


@app.command()
def down() -> None:
    """Stop every process and return when all of them are gone.

    Example: gptloop down
    """
    print("Everything is stopped." if _read_stack().down() else "Nothing ran.")


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Show every process and its health.

    The exit code is 0 if all are healthy, 1 if one is not, and 3 if nothing is up.

    \b
    Examples:
      gptloop status
      gptloop status --json
    """
    statuses = _read_stack().status()
    print_list(statuses or [], COLUMNS, as_json=as_json, empty="Nothing is up. Start everything with `gptloop up`.")
    if statuses is None:
        raise typer.Exit(3)
    raise typer.Exit(0 if all(each.is_healthy for each in statuses) else 1)


def _read_stack() -> Stack:
    directories = read_directories(os.environ)
    refuse_services(manager_of(os.environ), directories)
    return Stack(directories, read_ports(os.environ), os.environ)
