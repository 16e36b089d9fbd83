"""Runs a command of `gptloop` with make's variables as its options: `python -m deploy.make TARGET COMMAND`.

`GPTLOOP_GIVEN` names the variables on make's command line. Their values come from the environment, so that no shell
interprets them. `TOP_K=1` is `--top-k 1`, `DIR=x` the argument DIR, and `DRY_RUN=yes` the flag `--dry-run`. Every
option of a command is a variable of its target.
"""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import os
import sys
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from deploy.commands import COMMANDS, app
from shared.errors import InvalidArgument
from shared.service import cli
from shared.service.logs import read_log_settings
from shared.text import excerpt

# Read by the libraries below the services.
_OF_LIBRARIES = ("OMP_NUM_THREADS", "OTEL_EXPORTER_OTLP_ENDPOINT", "TIKTOKEN_CACHE_DIR")


def variables(command: str) -> dict[str, Any]:
    """Returns the parameters of a command, by the names of the variables that set them."""
    return {_variable(parameter): parameter for parameter in COMMANDS[command].load().params}


def _variable(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).upper()
    (option, *_) = parameter.opts
    return str(option).lstrip("-").replace("-", "_").upper()


def parameters(target: str, takes: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str | list[str]]:
    """Returns the values that make was given for the parameters of a command. An empty value counts as none.

    Raises `InvalidArgument` if a variable is neither one of the target nor a setting, which make exports.
    """
    values: dict[str, str | list[str]] = {}
    for name, value in given.items():
        if name not in takes:
            _check_setting(name, target, takes)
        elif value:
            several = takes[name].multiple or takes[name].nargs == -1
            values[takes[name].name] = [value] if several else value
    return values


def _check_setting(name: str, target: str, takes: Collection[str]) -> None:
    settings = known_settings()
    if name in settings:
        return
    if name.startswith("GPTLOOP_"):
        what, otherwise = "a setting", "; the README of each service lists its settings."
        near = get_close_matches(name.upper(), settings, n=1, cutoff=0.8)
    else:
        what, otherwise = f"a variable of `make {target}`", f", which takes {', '.join(takes) or 'none'}."
        near = get_close_matches(name.upper(), takes, n=1)
    raise InvalidArgument(f"{excerpt(name)} is not {what}{f'; did you mean {near[0]}?' if near else otherwise}")


class _Recorder(dict[str, str]):
    """An empty environment that records the names that it is asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return default


def known_settings() -> set[str]:
    """Returns the name of every environment variable that configures a process."""
    # Loading these takes a moment, and few people type settings after make.
    import inference_service.settings
    import trainer_service.settings

    environment = _Recorder()
    inference_service.settings.read_settings(environment)
    trainer_service.settings.read_settings(environment)
    read_log_settings(environment)
    return environment.names.union(_OF_LIBRARIES)


def _run(target: str, command: str) -> int:
    takes = variables(command)
    given = {name: os.environ.get(name, "") for name in os.environ.get("GPTLOOP_GIVEN", "").split()}
    names = {parameter.name: name for name, parameter in takes.items()}
    values = parameters(target, takes, given)
    return cli.invoke(app, [command], {command: values}, lambda name: f"{names[name]}=")


if __name__ == "__main__":
    cli.end(lambda: _run(*sys.argv[1:]))
