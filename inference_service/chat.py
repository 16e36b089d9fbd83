"""The conversation of `gptloop chat`: continues each line that a person types, and takes commands."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from inference_service.client.client import InferenceClient, Parameters
from inference_service.draft import DEFAULT_MAX_TOKENS, Selection, new_draft
from inference_service.terminal import Answer, Terminal, new_answer, new_notes
from shared.atomic_file import replacing
from shared.decoding.sampling import SamplingParameters
from shared.errors import AlreadyExists, FailedPrecondition, GptloopError, InvalidArgument, shown

_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class _Command:
    usage: str
    what: str

    @property
    def name(self) -> str:
        return self.usage.partition(" ")[0]


_COMMANDS = (
    _Command("/retry", "the last line again, with another seed"),
    _Command("/version N", "the version that answers, or a label such as best"),
    _Command("/seed N", "the same answer to the same line again"),
    _Command("/temperature X", "0: always the most likely token; higher: more varied"),
    _Command("/top-p X", "only the most likely tokens that together reach this probability"),
    _Command("/max-tokens N", "at most this many tokens an answer"),
    _Command("/reset", "back to the settings of the start"),
    _Command("/save FILE", "writes what was said so far into a file"),
    _Command("/help", "lists the commands"),
    _Command("/quit", "or Ctrl-D; Ctrl-C stops an answer"),
)
_NAMES = [command.name for command in _COMMANDS]
# The settings that are numbers, by the command that changes them.
_NUMBERS: dict[str, Callable[[str], float]] = {"seed": int, "temperature": float, "top_p": float, "max_tokens": int}


class Chat:
    """Continues lines from standard input until it ends.

    On a terminal, lines can be edited, and the settings stand below them; from a pipe, they are read as they are.

    parameters: the settings of the start.
    history: the file with the lines that were typed at a terminal.
    """

    def __init__(self, client: InferenceClient, parameters: Parameters, history: Path) -> None:
        self._client = client
        self._initial = parameters
        self._settings = parameters.copy()
        self._history = history
        self._terminal = Terminal(client)
        self._notes = new_notes()
        # Each answer with the settings that it was asked for with.
        self._said: list[tuple[Answer, Parameters]] = []
        self._files = set[Path]()
        self._number = 0

    def run(self) -> None:
        """Reads lines until the end of the input; an error is shown and ends nothing, except at the start."""
        model = self._client.model(self._initial.get("version"), self._initial.get("label"))
        self._number = model.version
        self._notes.print(f"version {model.version}, {model.parameters:,} parameters. /help lists the commands.")
        read = self._reader()
        while True:
            try:
                line = read().strip()
                if line == "/quit":
                    return
                if line.startswith("/"):
                    self._obey(line)
                elif line:
                    self._answer(line, self._settings)
            except EOFError:
                self._notes.print()
                return
            except KeyboardInterrupt:
                continue
            except GptloopError as error:
                self._notes.print(f"error: {error}", markup=False)

    def _reader(self) -> Callable[[], str]:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            return input
        from inference_service.line_editor import LineEditor

        editor = LineEditor(self._history, _NAMES, lambda text: self._notes.print(f"note: {text}", markup=False))
        return lambda: editor.read(self._describe())

    def _answer(self, prompt: str, parameters: Parameters) -> None:
        answer = new_answer(prompt, parameters)
        self._said.append((answer, parameters))
        self._terminal.stream(answer, parameters)

    def _obey(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/retry":
                if not self._said:
                    raise FailedPrecondition("There is no line to try again yet.")
                self._answer(self._said[-1][0].prompt, {**self._settings, "seed": None})
            case "/save":
                self._save(value)
            case "/help":
                self._help()
            case "/reset":
                self._change(self._initial.copy())
            case "/version":
                self._choose_version(value)
            case _ if name in _NAMES:
                self._set_number(name, value)
            case _:
                near = get_close_matches(name, _NAMES, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}? /help lists them all" if near else "/help lists the commands"
                raise InvalidArgument(f"Unknown command {shown(name)}: {hint}.")

    def _help(self) -> None:
        self._notes.print("The model continues each line that you type; it does not see the lines before it.")
        for command in _COMMANDS:
            self._notes.print(f"  {command.usage:<16} {command.what}", markup=False)
        self._notes.print(
            "A setting without a value goes back to its default: a new seed each time, the serving version."
        )

    def _set_number(self, name: str, value: str) -> None:
        field = name.removeprefix("/").replace("-", "_")
        try:
            number = _NUMBERS[field](value) if value else None
        except ValueError:
            raise InvalidArgument(f"{name} needs a number, not {shown(value)}.") from None
        self._change({**self._settings, field: number})  # type: ignore[misc]

    def _choose_version(self, value: str) -> None:
        number = int(value) if value.isascii() and value.isdecimal() and len(value) <= 18 else None
        label = value if value and number is None else None
        self._client.model(number, label)
        self._change({**self._settings, "version": number, "label": label})

    def _change(self, settings: Parameters) -> None:
        """Takes settings over; raises `InvalidArgument` if a value is impossible."""
        if not 0 <= (seed := settings.get("seed") or 0) <= _MAX_SEED:
            raise InvalidArgument(f"seed is {seed}, but must be from 0 to {_MAX_SEED}.")
        sampling, max_tokens = _defaulted(settings)
        new_draft(selection=Selection(), prompt="", slots=1, sampling=sampling, max_tokens=max_tokens)
        self._settings = settings
        if not sys.stdin.isatty():
            self._notes.print(self._describe(), style="dim")

    def _describe(self) -> str:
        """Describes the current settings in one line."""
        version, label = self._settings.get("version"), self._settings.get("label")
        with suppress(GptloopError):  # a server that does not answer shows that at the next line
            self._number = self._client.model(version, label).version
        which = f"version {self._number}"
        if version is None:
            which += f", {label}" if label else ", serving"
        seed = self._settings.get("seed")
        return f"{which} · {_describe(self._settings)} · {'random seed' if seed is None else f'seed {seed}'}"

    def _save(self, name: str) -> None:
        if not name:
            raise InvalidArgument("/save needs the name of a file.")
        said = [(answer, settings) for answer, settings in self._said if answer.started is not None]
        if not said:
            raise FailedPrecondition("Nothing was said yet.")
        path = Path(name).expanduser().absolute()
        if path.exists() and path not in self._files:
            raise AlreadyExists(f"{shown(str(path))} exists; name a new file.")
        text = "\n\n".join(
            f"{answer.prompt}{answer.texts[0]}\n"
            f"[version {answer.started.model_version} · {_describe(settings)} · seed {answer.started.seed}]"
            for answer, settings in said
            if answer.started is not None
        )
        try:
            with replacing(path) as file:
                file.write(f"{text}\n".encode(errors="replace"))
        except OSError as error:
            raise InvalidArgument(f"{shown(str(path))} cannot be written: {error.strerror}.") from None
        self._files.add(path)
        self._notes.print(f"What was said so far is in {path}.", markup=False)


def _defaulted(settings: Parameters) -> tuple[SamplingParameters, int]:
    """Returns how tokens are drawn with these settings, and how many at most."""
    names = ("temperature", "top_p")
    given = {name: value for name in names if (value := settings.get(name)) is not None}
    max_tokens = settings.get("max_tokens")
    return SamplingParameters(**given), DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens  # type: ignore[arg-type]


def _describe(settings: Parameters) -> str:
    sampling, max_tokens = _defaulted(settings)
    return f"temperature {sampling.temperature:g} · top-p {sampling.top_p:g} · max tokens {max_tokens}"
