"""Reads lines from a person at a terminal."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.output import create_output
from prompt_toolkit.styles import Style

from inference_service.word_wrap import WordWrap

_STYLE = Style.from_dict({"bottom-toolbar": "noreverse dim"})


class LineEditor:
    """Reads lines with editing, a history, and completion with Tab; shows what is typed on standard error.

    history: the file with the lines that were typed, which nobody else can read.
    words: what a line may begin with.
    report: is told why the history is not kept, if it cannot be.
    """

    def __init__(self, history: Path, words: Sequence[str], report: Callable[[str], None]) -> None:
        self._path = history
        self._file: FileHistory | None = FileHistory(history)
        self._report = report
        self._session = PromptSession[str](
            history=InMemoryHistory(self._earlier()),
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            style=_STYLE,
            output=create_output(stdout=sys.stderr),
        )

    def read(self, status: str) -> str:
        """Returns the next line; shows `status` below it meanwhile.

        Raises EOFError after Ctrl-D, and KeyboardInterrupt after Ctrl-C.
        """
        wrap, width = WordWrap(), self._session.output.get_size().columns
        line = self._session.prompt("> ", bottom_toolbar=wrap.add(status, width) + wrap.end(width))
        if self._file is not None and line.strip():
            try:
                # It may have been removed since the last line.
                _make_private(self._path)
                self._file.store_string(line)
            except OSError as error:
                self._give_up(error)
        return line

    def _earlier(self) -> list[str]:
        assert self._file is not None
        try:
            _make_private(self._path)
            return list(self._file.load_history_strings())[::-1]
        except OSError as error:
            self._give_up(error)
            return []

    def _give_up(self, error: OSError) -> None:
        self._file = None
        self._report(f"The lines that you type are not kept in {self._path}: {error.strerror}.")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)
