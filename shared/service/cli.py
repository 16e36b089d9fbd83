"""What the commands of both services do alike: one-sentence errors, orderly ends, stages of work, durations."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TextIO

import typer
from rich.console import Console

from shared.errors import GptloopError, InvalidArgument, shown
from shared.service import interrupts
from shared.service.live_bar import LiveBar
from shared.text import shorten

_LONGEST_SENTENCE = 300
# What a value must be, in words.
_KINDS = {
    "a valid boolean": "1, 0, yes, no, true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
}


def new_app(description: str | None) -> typer.Typer:
    """An app whose help is plain text, which no terminal is too narrow for, and is shown with `-h` too."""
    return typer.Typer(
        help=description,
        pretty_exceptions_enable=False,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def run(app: typer.Typer) -> NoReturn:
    """Runs the command that the arguments of this process name, and exits as `end` does."""
    end(lambda: invoke(app))


def end(work: Callable[[], object]) -> NoReturn:
    """Does the work of a process and exits with the code that it returns, if any.

    Otherwise 1 for an expected error, or one of the file system, which is one sentence, and if nobody reads the output
    any more; 2 if the call itself was wrong; 130 after Ctrl-C.
    """
    _make_streams_robust()
    code = _code_of(work)
    for stream in (sys.stdout, sys.stderr):
        if not _flush(stream):
            code = code or 1
    if code == interrupts.EXIT_CODE:
        # Threads that are still at work would hold up an orderly end.
        os._exit(code)
    sys.exit(code)


def _code_of(work: Callable[[], object]) -> int:
    try:
        with interrupts.raised():
            code = work()
            return code if isinstance(code, int) else 0
    except GptloopError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    except (typer.Abort, KeyboardInterrupt):
        return interrupts.EXIT_CODE
    except BrokenPipeError:
        return 1
    except OSError as error:
        what = f"{shown(str(error.filename))}: {error.strerror}" if error.filename else error.strerror or error
        print(f"error: {what}.", file=sys.stderr)
        return 1


def invoke(
    app: typer.Typer,
    arguments: Sequence[str] | None = None,
    values: Mapping[str, object] | None = None,
    named: Callable[[str], str] | None = None,
) -> int:
    """Runs a command and returns its exit code; raises `InvalidArgument` if the call is wrong.

    arguments: those of this process by default.
    values: parameters that no argument sets, by name, in a mapping for each subcommand.
    named: what a person calls a parameter of that name; by default its option or its argument.
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
    """What is wrong with the call."""
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
    """Why a value of a parameter cannot be used; the library that has checked it knows what it was."""
    findings = getattr(error.__cause__, "errors", None)
    if findings is None:
        return f"{name}: {error.message}."
    (finding, *_) = findings()
    what = finding["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{name.removesuffix('=')} is {shown(finding['input'])}, but must be {_KINDS.get(what, what)}."


def _make_streams_robust() -> None:
    """Nothing that is printed or read can fail for its encoding, or because a stream was closed from the start."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # Also keeps files that are opened later from taking the place of the closed stream.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush(stream: TextIO) -> bool:
    """Whether what was printed could be written; if not, nothing more is tried when the interpreter ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False
    return True


class Stages:
    """Shows work that has stages: a live bar on a terminal, a line a stage elsewhere."""

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
        """Shows a stage and how much of it is done, from 0 to 1."""
        self._bar.show(fraction, stage)
        if stage != self._stage and not self._console.is_terminal:
            self._console.print(stage, markup=False, highlight=False)
        self._stage = stage
