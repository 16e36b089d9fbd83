"""How commands end, tested with real processes as a shell sees them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_S

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[3]
COMMANDS = """
import signal
import threading
import time
from typing import Annotated

import typer

from shared.service import cli, interrupts
from shared.errors import InvalidArgument, NotFound

interrupts.end_quietly()
TIMES = "How often to print the word, as a whole number."
app = cli.new_app("Commands of a test.")


@app.command()
def say(word: str, times: Annotated[int, typer.Option(min=1, help=TIMES)] = 1) -> None:
    for _ in range(times):
        print(word)


@app.command()
def fail(how: str) -> None:
    raise {"missing": NotFound("There is none."), "wrong": InvalidArgument("It is wrong."),
           "file": FileNotFoundError(2, "No such file or directory", "x.txt")}[how]


@app.command()
def ignores() -> None:
    print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


@app.command()
def wait() -> None:
    # A thread that cannot be ended, like native code of a library.
    threading.Thread(target=time.sleep, args=(600,)).start()
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("cleaned up")


cli.run(app)
"""


def ended(*words: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, *words],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["fail", "missing"], 1, "error: There is none.\n"),
        (["fail", "wrong"], 2, "error: It is wrong.\n"),
        (["fail", "file"], 1, "error: 'x.txt': No such file or directory.\n"),
        (["fial"], 2, "error: No such command 'fial'. Did you mean 'fail'?\n"),
        (["say", "a", "--tims", "2"], 2, "error: No such option: --tims. Did you mean --times?\n"),
        (["say", "a", "--times", "0"], 2, "error: --times is '0', but must be greater than or equal to 1.\n"),
        (["say", "a", "--times", "x" * 500], 2, None),
        (["say"], 2, "error: WORD is missing.\n"),
        (["say", *"x" * 900], 2, None),
    ],
)
def test_an_error_is_one_short_sentence(words: list[str], code: int, sentence: str | None) -> None:
    returned, out, err = ended(*words)
    assert (returned, out) == (code, "")
    assert err == sentence if sentence else len(err) < 320 and err.count("\n") == 1


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_shown(option: str) -> None:
    assert ended("say", option)[0] == 0 and "Usage" in ended(option)[1]
    assert ended()[:2] == ended(option)[:2]


def test_help_is_complete_on_a_narrow_terminal() -> None:
    code, out, _ = ended("say", "--help", COLUMNS="40")
    assert code == 0 and "--times" in out and "How often to print the word" in " ".join(out.split()) and "…" not in out


def test_characters_that_a_stream_cannot_encode_are_escaped() -> None:
    assert ended("say", "ä文\udc80", PYTHONIOENCODING="ascii:strict")[:2] == (0, "\\xe4\\u6587\\udc80\n")
    assert ended("say", "ä文", PYTHONIOENCODING="utf-8")[1] == "ä文\n"


@pytest.mark.parametrize(
    ("redirection", "code"), [(">&-", 0), ("<&- >&- 2>&-", 0), ("> /dev/full", 1), ("| head -n 1 > /dev/null", 1)]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_or_full_output_ends_a_command_without_a_traceback(
    redirection: str, code: int, unbuffered: str
) -> None:
    if "full" in redirection and not Path("/dev/full").exists():
        pytest.skip("Needs /dev/full.")
    script = f'"$0" -c "$1" say word --times 100000 {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, COMMANDS],
        cwd=PROJECT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == code
    assert done.stderr in ("", "error: No space left on device.\n")


def test_ctrl_c_lets_a_command_clean_up_and_waits_for_no_thread() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, "wait"], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANG_S)
    assert (process.returncode, out, err) == (130, "cleaned up\n", "")


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    done = subprocess.run(
        ["bash", "-c", 'trap \'\' INT; exec "$0" -c "$1" ignores', sys.executable, COMMANDS],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.stdout, done.stderr) == ("True\n", "")
