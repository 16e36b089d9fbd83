"""Commands of both services: one-sentence errors, exit codes, and progress in stages."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TextIO

import typer
from rich.console import Console

from shared.errors import GptloopError, InvalidArgument, shown
from shared.service import interrupts
from shared.service.live_bar import LiveBar
from shared.service.logs import report_error
from shared.text import shorten

_LONGEST_SENTENCE = 300
# What the validation library expects, and how an error says it.
_KINDS = {
    "a valid boolean": "1, 0, yes, no, true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
}


def new_app(description: str | None) -> typer.Typer:
    """Returns an app whose help is plain text, fits any terminal, and is also shown with `-h`."""
    return typer.Typer(
        help=description,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(app: typer.Typer) -> NoReturn:
    """Runs the command in the arguments of this process, and exits as `end` does."""
    end(lambda: invoke(app))


def end(work: Callable[[], object]) -> NoReturn:
    """Runs `work` and exits with the code that it returns, or else 0.

    The exit code is 1 after a `GptloopError` or an `OSError`, which is printed as one sentence, or if the output is
    closed; 2 after `InvalidArgument`; 130 after Ctrl-C.
    """
    _make_streams_robust()
    code = _code_of(work)
    for stream in (sys.stdout, sys.stderr):
        if not _flush(stream):
            code = code or 1
    if code == interrupts.EXIT_CODE:
        # A normal exit would wait for threads that still run.
        os._exit(code)
    sys.exit(code)


def _code_of(work: Callable[[], object]) -> int:
    try:
        with interrupts.raised():
            code = work()
            return code if isinstance(code, int) else 0
    except GptloopError as error:
        report_error(str(error))
        return 2 if isinstance(error, InvalidArgument) else 1
    except (typer.Abort, KeyboardInterrupt):
        return interrupts.EXIT_CODE
    except BrokenPipeError:
        return 1
    except OSError as error:
        what = f"{shown(str(error.filename))}: {error.strerror}" if error.filename else error.strerror or error
        report_error(f"{what}.")
        return 1


def invoke(
    app: typer.Typer,
    arguments: Sequence[str] | None = None,
    values: Mapping[str, object] | None = None,
    named: Callable[[str], str] | None = None,
) -> int:
    """Runs a command and returns its exit code; raises `InvalidArgument` if its arguments are invalid.

    arguments: the arguments; by default those of this process.
    values: defaults for parameters, by name, in a mapping for each subcommand.
    named: returns how an error names a parameter; by default as its option or its argument.
    """
    command = typer.main.get_command(app)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given and isinstance(command, typer.core.TyperGroup):
        given = ["--help"]
    try:
        code = command.main(given, standalone_mode=False, default_map=dict(values or {}))
    except typer.TyperException as error:
        raise InvalidArgument(_sentence(error, named)) from None
    return code if isinstance(code, int) else 0


def _sentence(error: typer.TyperException, named: Callable[[str], str] | None) -> str:
    """Returns one sentence about an invalid call."""
    if isinstance(error, typer.BadParameter) and (parameter := error.param) is not None:
        if named is not None:
            name = named(parameter.name or "")
        elif parameter.param_type_name == "argument":
            name = str(parameter.metavar or parameter.name).upper()
        else:
            name = max(parameter.opts, key=len)
        message = f"{name} is missing." if not error.message else _refusal(name, error)
    elif near := getattr(error, "possibilities", None):
        message = f"{error.message}. Did you mean {' or '.join(sorted(near))}?"
    else:
        message = error.format_message()
    return shorten(message, _LONGEST_SENTENCE)


def _refusal(name: str, error: typer.BadParameter) -> str:
    """Returns one sentence about an invalid value; the cause of the error holds the value, if there is one."""
    findings = getattr(error.__cause__, "errors", None)
    if findings is None:
        return f"{name}: {error.message}."
    (finding, *_) = findings()
    what = finding["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{name.removesuffix('=')} is {shown(finding['input'])}, but must be {_KINDS.get(what, what)}."


def _make_streams_robust() -> None:
    """Keeps printing and reading from failing because of an encoding, or a stream that was closed from the start."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Also keeps a file that is opened later from getting the descriptor of the closed stream.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush(stream: TextIO) -> bool:
    """Flushes a stream and returns whether that worked; if not, the interpreter does not try it again at its end."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


class Stages:
    """Shows the stages of some work: as a live bar on a terminal, elsewhere as one line for each stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = LiveBar(self._console)
        self._stage = ""

    def __enter__(self) -> "Stages":
        if self._console.is_terminal:
            self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def show(self, stage: str, fraction: float | None) -> None:
        """Shows a stage, and the fraction of it that is done, from 0 to 1."""
        self._bar.show(fraction, stage)
        if stage != self._stage and not self._console.is_terminal:
            self._console.print(stage, markup=False, highlight=False)
        self._stage = stage
