"""User units of systemd."""

import re
import subprocess
from pathlib import Path
from string import Template

from deploy.services.installation import PROCESSES, Installation, Process
from shared.service.settings import Environment, read_str

_TEMPLATES = Path(__file__).parent
_TARGET = "gptloop.target"
_ANSWER_LIMIT_S = 10.0
_GIVES_WAY = "IOSchedulingClass=best-effort\nIOSchedulingPriority=7"
# systemd runs no program with a quote in its path, so a shell does. The colon keeps systemd from replacing `$name`.
_SHELL = (":/bin/sh", "-c", 'exec "$@"', "sh")
_VARIABLE = re.compile(r'^Environment="(\w+)=(.*)"$', re.MULTILINE)


class Systemd:
    """Writes a unit for each process, and a target that starts and stops them together."""

    name = "systemd"
    program = "systemctl"
    start = f"systemctl --user daemon-reload && systemctl --user enable --now {_TARGET}"
    stop = f"systemctl --user stop {_TARGET} 'gptloop-*'"
    hint = "The services run while you are logged in. `loginctl enable-linger` lets them run always."

    def __init__(self, environment: Environment) -> None:
        home = Path(read_str(environment, "HOME", str(Path.home())))
        configuration = Path(read_str(environment, "XDG_CONFIG_HOME", str(home / ".config")))
        self._folder = configuration / "systemd" / "user"

    def files(self, installation: Installation) -> dict[Path, bytes]:
        """Returns every file of the services, with its contents."""
        units = {_unit_name(process): _unit(installation, process) for process in installation.processes}
        target = Template((_TEMPLATES / _TARGET).read_text(encoding="utf-8")).substitute(units=" ".join(units))
        texts = {**units, _TARGET: target}
        return {self._folder / name: text.encode() for name, text in texts.items()}

    def installed(self) -> list[Path]:
        """Returns the files of services that exist, with the link that enables them."""
        paths = [*map(_unit_name, PROCESSES), _TARGET, f"default.target.wants/{_TARGET}"]
        return [path for path in map(self._folder.joinpath, paths) if path.is_symlink() or path.exists()]

    def settings(self, contents: bytes) -> dict[str, str]:
        """Returns the variables in the contents of a unit."""
        found = _VARIABLE.findall(contents.decode(errors="replace"))
        return {name: re.sub(r"\\(.)", r"\1", text.replace("%%", "%")) for name, text in found}

    def is_running(self) -> bool:
        """Whether this user has a systemd that can start the services."""
        command = [self.program, "--user", "is-system-running"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_LIMIT_S).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return False
        return answer not in ("", "offline", "unknown")

    def logs(self, folder: Path) -> str:
        """Returns the command that shows the logs; systemd's journal holds them and limits them."""
        return "journalctl --user-unit 'gptloop-*' --follow"


def _unit_name(process: Process) -> str:
    return f"gptloop-{process.name}.service"


def _unit(installation: Installation, process: Process) -> str:
    environment = (f"{name}={text}" for name, text in installation.environment.items())
    return Template((_TEMPLATES / "process.service").read_text(encoding="utf-8")).substitute(
        title=process.title,
        after="" if process.name == "redis" else "gptloop-redis.service",
        # Not split into words, so it takes no quotes.
        root=str(installation.root).replace("%", "%%"),
        command=" ".join(map(_quoted, (*_SHELL, *installation.command(process)))),
        environment="\n".join(f"Environment={_quoted(each)}" for each in environment),
        stop_s=process.stop_s,
        priority=_GIVES_WAY if process.gives_way else "",
    )


def _quoted(word: str) -> str:
    """Returns a word as systemd reads it unchanged: in quotes, without its specifiers and escapes."""
    return '"{}"'.format(re.sub(r'(["\\])', r"\\\1", word).replace("%", "%%"))
