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
from shared.text import excerpt

_NO_SETTING = "; the README of each service lists its settings."


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
    # Loading it takes a moment, and few people type settings after make.
    from deploy.known_settings import known_settings

    if name in (known := known_settings()):
        return
    if name.startswith("GPTLOOP_"):
        raise InvalidArgument(f"{excerpt(name)} is not a setting{_advice(name, known, _NO_SETTING, 0.8)}")
    otherwise = f", which takes {', '.join(takes)}." if takes else ", which takes none."
    raise InvalidArgument(f"{excerpt(name)} is not a variable of `make {target}`{_advice(name, takes, otherwise)}")


def _advice(name: str, names: Collection[str], otherwise: str, cutoff: float = 0.6) -> str:
    near = get_close_matches(name.upper(), names, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else otherwise


def _run(target: str, command: str) -> int:
    takes = variables(command)
    given = {name: os.environ.get(name, "") for name in os.environ.get("GPTLOOP_GIVEN", "").split()}
    names = {parameter.name: name for name, parameter in takes.items()}
    values = parameters(target, takes, given)
    return cli.invoke(app, [command], {command: values}, lambda name: f"{names[name]}=")


if __name__ == "__main__":
    cli.end(lambda: _run(*sys.argv[1:]))
