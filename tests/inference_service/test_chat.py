"""Conversations, most of them through a pseudo-terminal; test_server.py tests one from a pipe against a real server."""

import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import Message

from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.inference_service.process import ROOT
from tests.inference_service.scripted_server import ScriptedServer, fail, hang
from tests.inference_service.typist import CTRL_C, CTRL_D, CTRL_R, UP, Typist
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

WORDS = " upon a time there was a little dragon who liked to watch the clouds from the top of the highest hill"


def answer(server: ScriptedServer, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
    """Tells a story in pieces that end within words, with the seed of the request or 41."""
    if isinstance(request, pb.GetModelRequest):
        if request.model.version > 7:
            yield from fail(errors.NotFound("There is no version 99."))(server, request, context)
        yield pb.GetModelResponse(version=request.model.version or 7, parameters=1000)
    elif isinstance(request, pb.GenerateRequest) and request.prompt == "Forever":
        yield from hang(pb.Started(model_version=7, seed=41), pb.Delta(text=" and ever "))(server, request, context)
    elif isinstance(request, pb.GenerateRequest):
        sampling = request.sampling
        yield pb.Started(model_version=7, seed=sampling.seed if sampling.HasField("seed") else 41)
        for begin in range(0, len(WORDS), 5):
            yield pb.Delta(text=WORDS[begin : begin + 5])
        yield pb.Finished(reason=pb.FINISH_REASON_EOS, generated_tokens=20)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer(answer)
    yield server
    server.stop()


@pytest.fixture
def chat(server: ScriptedServer, tmp_path: Path) -> Iterator[Typist]:
    with at_terminal(server, tmp_path / "var") as typist:
        typist.see("random seed")
        yield typist


def at_terminal(server: ScriptedServer, var: Path, *options: str) -> Typist:
    arguments = ("-m", "inference_service", "chat", "--address", server.address, *options)
    return Typist(*arguments, environment={"GPTLOOP_VAR": str(var)})


def asked(server: ScriptedServer) -> list[pb.GenerateRequest]:
    return [request for request in server.requests if isinstance(request, pb.GenerateRequest)]


def await_line(chat: Typist) -> None:
    """Returns once a line can be typed after the last answer."""
    wait_until(lambda: "max tokens" in re.split("EOS|stopped after", chat.shown)[-1])


def leave(chat: Typist) -> None:
    await_line(chat)
    chat.type(CTRL_D)
    assert chat.end() == 0, chat.shown
    assert "Traceback" not in chat.shown


def test_words_are_not_broken_across_lines(chat: Typist) -> None:
    chat.type("Once\r")
    chat.see("EOS")
    (story,) = re.findall(r"^(Once upon.*?)\nversion 7", chat.shown, re.DOTALL | re.MULTILINE)
    assert story.split() == f"Once{WORDS}".split()
    assert all(len(line) < 80 for line in story.split("\n")) and len(story.split("\n")) == 2
    leave(chat)


def test_ctrl_c_ends_the_answer_and_not_the_program(chat: Typist, server: ScriptedServer) -> None:
    chat.type("Forever\r")
    chat.see("Forever and")
    chat.type(CTRL_C)
    chat.see("stopped after")
    wait_until(server.left.is_set)
    await_line(chat)
    chat.type("Onc" + CTRL_C)
    chat.type("Once\r")
    chat.see("EOS")
    assert [request.prompt for request in asked(server)] == ["Forever", "Once"]
    leave(chat)


def test_lines_can_be_edited_and_come_back_in_the_next_chat(
    chat: Typist, server: ScriptedServer, tmp_path: Path
) -> None:
    chat.type("Twce\x1b[D\x1b[D\x7f\x7fOn\r")
    chat.see("EOS")
    leave(chat)
    history = tmp_path / "var" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    history.chmod(0o644)
    with at_terminal(server, tmp_path / "var") as again:
        again.see("random seed")
        again.type(UP + "\r")
        again.see("EOS")
        await_line(again)
        again.type(CTRL_R + "nc\r\r")
        again.see("EOS", times=2)
        leave(again)
    assert [request.prompt for request in asked(server)] == ["Once"] * 3
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_reported_and_ends_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "var" / "chat_history").mkdir(parents=True)
    with at_terminal(server, tmp_path / "var") as chat:
        chat.see("are not kept in")
        chat.type("Once\r")
        chat.see("EOS")
        leave(chat)


def test_the_settings_stand_below_the_line_and_reach_the_server(chat: Typist, server: ScriptedServer) -> None:
    chat.see("version 7, serving · temperature 0.8 · top-p 1 · max tokens")
    for command in ("/temperature 0.5", "/top-p 0.75", "/max-tokens 30", "/seed 5", "/version 3"):
        chat.type(f"{command}\r")
    chat.see("version 3 · temperature 0.5 · top-p 0.75 · max tokens 30 ·")
    chat.see("seed 5")
    chat.type("Once\r")
    chat.see("EOS")
    chat.type("/version best\r")
    chat.see("version 7, best · ")
    (request,) = asked(server)
    assert (request.model.version, request.max_tokens, request.sampling.seed) == (3, 30, 5)
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.75)
    leave(chat)


def test_settings_that_are_wider_than_the_terminal_are_shown_whole(server: ScriptedServer, tmp_path: Path) -> None:
    with at_terminal(server, tmp_path / "var", "--seed", str(2**64 - 1), "--temperature", "0.12345") as chat:
        chat.see(str(2**64 - 1))
        leave(chat)


def piped(server: ScriptedServer, *lines: str, options: tuple[str, ...] = (), cwd: Path = ROOT) -> tuple[str, str]:
    """Types lines into a pipe; returns standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "inference_service", "chat", *options, "--address", server.address],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT)},
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_a_pipe_gets_the_text_alone_and_unbroken(server: ScriptedServer) -> None:
    output, notes = piped(server, "Once", "/top-p 0.5", "/reset")
    assert output == f"Once{WORDS}\n"
    assert "top-p 0.5 · " in notes and notes.rstrip().endswith(
        "version 7, serving · temperature 0.8 · top-p 1 · max tokens 256 · random seed"
    )


def test_retry_asks_again_with_another_seed_and_keeps_the_setting(server: ScriptedServer) -> None:
    _, notes = piped(server, "/retry", "/seed 5", "Once", "/retry", "Twice")
    assert "error: There is no line to try again yet.\n" in notes
    assert [(request.prompt, request.sampling.HasField("seed")) for request in asked(server)] == [
        ("Once", True),
        ("Once", False),
        ("Twice", True),
    ]


def test_a_setting_without_a_value_is_the_default_and_reset_brings_the_start_back(server: ScriptedServer) -> None:
    options = ("--temperature", "0.5", "--version", "3")
    _, notes = piped(server, "/temperature", "/version", "/reset", options=options)
    settings = re.findall(r"^version (.*?) · temperature (\S+)", notes, re.MULTILINE)
    assert settings == [("3", "0.8"), ("7, serving", "0.8"), ("3", "0.5")]


def test_save_writes_what_was_said(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("mine")
    lines = ("/save a.txt", "Once", "/save a.txt", "/seed 5", "Twice", "/save a.txt", "/save other.txt", "/save no/a")
    _, notes = piped(server, *lines, cwd=tmp_path)
    settings = "temperature 0.8 · top-p 1 · max tokens 256"
    assert (tmp_path / "a.txt").read_text() == (
        f"Once{WORDS}\n[version 7 · {settings} · seed 41]\n\nTwice{WORDS}\n[version 7 · {settings} · seed 5]\n"
    )
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert re.findall("error: (.*)", notes) == [
        "Nothing was said yet.",
        f"{errors.shown(str(tmp_path / 'other.txt'))} exists; name a new file.",
        f"{errors.shown(str(tmp_path / 'no/a'))} cannot be written: No such file or directory.",
    ]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/retyr", "Unknown command '/retyr': did you mean /retry? /help lists them all."),
        ("/topp 1", "Unknown command '/topp': did you mean /top-p? /help lists them all."),
        ("/xyz", "Unknown command '/xyz': /help lists the commands."),
        ("/seed x", "/seed needs a number, not 'x'."),
        ("/seed -1", "seed is -1, but must be from 0 to 18446744073709551615."),
        ("/temperature nan", "temperature is nan, but must be from 0 to 100."),
        ("/top-p 0", "top_p is 0, but must be above 0 and at most 1."),
        ("/max-tokens 0", "max_tokens is 0, but must be at least 1."),
        ("/version 99", "There is no version 99."),
        ("/save", "/save needs the name of a file."),
    ],
)
def test_a_wrong_command_is_one_sentence_and_changes_nothing(server: ScriptedServer, line: str, sentence: str) -> None:
    _, notes = piped(server, line, "Once")
    assert f"error: {sentence}\n" in notes
    (request,) = asked(server)
    assert request == pb.GenerateRequest(prompt="Once", sampling=pb.Sampling())


def test_help_lists_every_command(server: ScriptedServer) -> None:
    _, notes = piped(server, "/help")
    assert re.findall(r"^  (/[a-z-]+)", notes, re.MULTILINE) == [
        "/retry",
        "/version",
        "/seed",
        "/temperature",
        "/top-p",
        "/max-tokens",
        "/reset",
        "/save",
        "/help",
        "/quit",
    ]
