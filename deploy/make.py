"""The targets of make: runs a command with make's variables as its options.

`python -m deploy.make TARGET MODULE [COMMAND]`, where the variable `GPTLOOP_GIVEN` names those that stand on make's
command line, and the environment holds their values: no shell takes them apart. `TOP_K=1` is `--top-k 1`, `DIR=x` the
argument DIR, `DRY_RUN=yes` the flag `--dry-run`. Every option of a command is a variable of its target.
"""

if __name__ == "__main__":
    # Before the modules that take long to load.
    from shared.service import interrupts

    interrupts.end_quietly()

import argparse
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import typer

from shared.errors import InvalidArgument
from shared.service import cli
from shared.text import excerpt

# Settings, which make hands on to every process.
_SETTINGS = ("GPTLOOP_", "REDIS_URL", "TIKTOKEN_CACHE_DIR", "OPENBLAS_NUM_THREADS")


def app_of(module: str) -> typer.Typer:
    """The commands of a package or a module, as `python -m` runs them."""
    spec = find_spec(module)
    name = f"{module}.__main__" if spec and spec.submodule_search_locations else module
    app = import_module(name).app
    assert isinstance(app, typer.Typer)
    return app


def variables(app: typer.Typer, path: Sequence[str]) -> dict[str, Any]:
    """The parameters of a command, by the names of the variables that set them."""
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {_variable(parameter): parameter for parameter in command.params}


def _variable(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).upper()
    (option, *_) = parameter.opts
    return str(option).lstrip("-").replace("-", "_").upper()


def defaults(target: str, takes: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str | list[str]]:
    """The values of parameters that make was given; an empty value is none.

    Raises `InvalidArgument` where the target does not take a variable.
    """
    values: dict[str, str | list[str]] = {}
    for name, value in given.items():
        if name.startswith(_SETTINGS):
            continue
        if name not in takes:
            raise InvalidArgument(f"{excerpt(name)} is not a variable of `make {target}`{_advice(name, takes)}")
        if value:
            several = takes[name].multiple or takes[name].nargs == -1
            values[takes[name].name] = [value] if several else value
    return values


def _advice(name: str, takes: Mapping[str, Any]) -> str:
    near = get_close_matches(name.upper(), takes, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f", which takes {', '.join(takes)}." if takes else ", which takes none."


def _run(target: str, module: str, path: Sequence[str]) -> int:
    app = app_of(module)
    takes = variables(app, path)
    given = {name: os.environ.get(name, "") for name in os.environ.get("GPTLOOP_GIVEN", "").split()}
    names = {parameter.name: name for name, parameter in takes.items()}
    values: dict[str, Any] = dict(defaults(target, takes, given))
    for name in reversed(path):
        values = {name: values}
    return cli.invoke(app, path, values, lambda name: f"{names[name]}=")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m deploy.make", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("module")
    parser.add_argument("command", nargs="*")
    words = parser.parse_args()
    cli.end(lambda: _run(words.target, words.module, words.command))
