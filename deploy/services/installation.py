"""What the services of one folder of state run: the processes, their commands and their environment."""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from deploy.access import check_access, with_absolute_paths
from deploy.make import known_settings
from deploy.ports import read_ports
from shared.errors import InvalidArgument, shown
from shared.service.settings import Directories, Environment, read_directories, read_str

ROOT = Path(__file__).parent.parent.parent

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Process:
    """A process of the system.

    name: the name of its lock and of its log.
    words: what follows `python -m`.
    stop_s: how long it may take to end after SIGTERM; the same as in supervisord.conf.
    gives_way: whether its reads and writes come after those of others.
    """

    name: str
    title: str
    words: tuple[str, ...]
    stop_s: int
    gives_way: bool = False


PROCESSES = (
    Process("redis", "Redis", ("trainer_service", "redis"), stop_s=15),
    Process("trainer", "the trainer's API", ("trainer_service", "serve"), stop_s=20),
    Process("inference", "the inference server", ("inference_service", "serve"), stop_s=75),
    Process("worker", "the worker, which trains", ("trainer_service", "work"), stop_s=60, gives_way=True),
)


@dataclass(frozen=True)
class Installation:
    """The services of one folder of state.

    environment: the variables of every process.
    processes: in the order in which they start; they stop in the opposite order.
    """

    directories: Directories
    environment: Mapping[str, str]
    processes: tuple[Process, ...]
    root: Path = ROOT
    python: str = sys.executable

    def lock(self, process: Process) -> Path:
        """Returns the lock that the process holds while it runs, also under `gptloop up`."""
        return self.directories.var / "run" / f"{process.name}.lock"

    def command(self, process: Process, *before: str) -> list[str]:
        """Returns the command of a process; `before` is a program that starts it."""
        program = [*before, self.python, "-m", *process.words]
        return [self.python, "-m", "deploy.launch", str(self.lock(process)), *program]


def read_installation(environment: Environment) -> Installation:
    """Returns the services that have the settings in an environment.

    Raises `InvalidArgument` if a setting is invalid, or is a secret, which must not stand in the file of a service.
    """
    directories = read_directories(environment)
    read_ports(environment)
    check_access(environment)
    given = {name: text for name in sorted(known_settings()) if (text := read_str(environment, name, ""))}
    _check_secrets(given)
    kept = with_absolute_paths(given)
    # launchd and systemd start programs with a short PATH, in which neither Homebrew's Redis nor a compiler may be.
    kept |= {"GPTLOOP_VAR": str(directories.var), "PATH": read_str(environment, "PATH", "/usr/bin:/bin")}
    for name, text in {**kept, "The folder of the project": str(ROOT)}.items():
        if _CONTROL.search(text):
            raise InvalidArgument(
                f"{name} is {shown(text)}, but the file of a service cannot hold control characters or broken UTF-8."
            )
    is_embedded = "REDIS_URL" not in kept
    processes = tuple(process for process in PROCESSES if is_embedded or process.name != "redis")
    return Installation(directories, kept, processes)


def _check_secrets(given: Mapping[str, str]) -> None:
    if "GROQ_API_KEY" in given:
        raise InvalidArgument(
            "GROQ_API_KEY is a secret, which the file of a service must not hold: unset it, and set "
            "GPTLOOP_GROQ_KEY_FILE to a file that holds it."
        )
    if urlsplit(given.get("REDIS_URL", "")).password or "password=" in given.get("REDIS_URL", ""):
        raise InvalidArgument(
            "REDIS_URL contains a password, which the file of a service must not hold: take it out, and set "
            "GPTLOOP_REDIS_PASSWORD_FILE to a file that holds it."
        )
