"""How several samples are printed; test_server.py tests the rest through the command line."""

import sys
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from inference_service.__main__ import app
from inference_service.client import InferenceClient
from inference_service.terminal import Terminal
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.inference_service.scripted_server import STORY, Script, ScriptedServer, fail, send

STARTED = pb.Started(model_version=7, seed=41)
# The events of the two samples alternate, and the second sample ends first.
TWO = (
    STARTED,
    pb.Delta(index=0, text=" upon"),
    pb.Delta(index=1, text=" there"),
    pb.Delta(index=1, text=" was"),
    pb.Finished(index=1, reason=pb.FINISH_REASON_EOS, generated_tokens=1),
    pb.Delta(index=0, text=" a"),
    pb.Finished(index=0, reason=pb.FINISH_REASON_LENGTH, generated_tokens=1),
)


class Shown:
    """A terminal connected to a server that follows a script."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def generate(self, script: Script, *prompts: str) -> tuple[str, list[str]]:
        """Generates two samples of each prompt; returns standard output and the lines of standard error."""
        server = ScriptedServer(script)
        try:
            with InferenceClient(server.address) as client:
                if len(prompts) == 1:
                    Terminal(client).generate(prompts[0], {"n": 2})
                else:
                    Terminal(client).generate_all(prompts, {"n": 2})
        finally:
            server.stop()
            self.output, notes = self._capsys.readouterr()
            self.notes = notes.splitlines()
        return self.output, self.notes


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    return Shown(capsys)


@pytest.mark.parametrize(
    ("is_terminal", "text"),
    [(True, "Once \\x1b[2J\\x03\\r\\x9b é        a\n"), (False, "Once \x1b[2J\x03\r\x9b é\ta\n")],
)
def test_control_characters_of_a_model_are_escaped_on_a_terminal(
    shown: Shown, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, text: str
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    ends = [pb.Finished(index=index, reason=pb.FINISH_REASON_EOS) for index in (0, 1)]
    output, _ = shown.generate(send(STARTED, pb.Delta(text=" \x1b[2J\x03\r\x9b é\ta"), *ends), "Once")
    assert output.startswith(text)


def test_samples_are_printed_one_after_another(shown: Shown) -> None:
    output, notes = shown.generate(send(*TWO), "Once")
    assert output == "Once upon a\nOnce there was\n"
    assert notes == [
        "--- 1 of 2",
        "version 7 · seed 41 · 1 tokens · first token 0 ms · LENGTH",
        "--- 2 of 2",
        "version 7 · seed 42 · 1 tokens · first token 0 ms · EOS",
        "Sample 1 again: gptloop generate --prompt Once --version 7 --seed 41",
        "Sample 2 again: gptloop generate --prompt Once --version 7 --seed 42",
    ]


def test_an_interrupted_generation_prints_no_command_to_repeat_it(shown: Shown) -> None:
    cut = fail(errors.Unavailable("The server is shutting down; try again in a moment."), *TWO[:5])
    with pytest.raises(errors.Unavailable, match="is shutting down"):
        shown.generate(cut, "Once")
    assert len(shown.notes) == 2
    assert "stopped after" in shown.notes[1]


def test_after_an_error_no_further_sample_is_printed(shown: Shown) -> None:
    with pytest.raises(errors.Unavailable):
        shown.generate(fail(errors.Unavailable("The server ends."), *TWO[:4]), "Once")
    assert shown.output == "Once upon\n"


def test_the_samples_of_several_prompts_have_headings(shown: Shown) -> None:
    output, notes = shown.generate(send(*TWO), "One", "Two")
    assert output == "One upon a\nOne there was\nTwo upon a\nTwo there was\n"
    heads = [line.split(" · ")[:2] for line in notes[:-1]]
    assert heads == [
        ["--- 1, 1 of 2: version 7", "seed 41"],
        ["--- 1, 2 of 2: version 7", "seed 42"],
        ["--- 2, 1 of 2: version 7", "seed 41"],
        ["--- 2, 2 of 2: version 7", "seed 42"],
    ]
    assert notes[-1].startswith("2 prompts · 4 tokens in ")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    server = ScriptedServer(send(*STORY))
    yield server
    server.stop()


def test_every_option_reaches_the_request(server: ScriptedServer) -> None:
    sampling = pb.Sampling(
        seed=3,
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.75,
    )
    numbers = pb.GenerateRequest(max_tokens=9, min_tokens=2, n=1)
    fields = [*sampling.ListFields(), *numbers.ListFields()]
    options = [f"--{field.name.replace('_', '-')}={value}" for field, value in fields]
    arguments = ["generate", "--prompt", "Once", "--version", "7", "--stop", "x", "--stop", "y", *options]
    done = CliRunner().invoke(app, [*arguments, "--address", server.address])
    assert done.exit_code == 0, done.output
    expected = pb.GenerateRequest(prompt="Once", model=pb.ModelSelector(version=7), sampling=sampling, stop=["x", "y"])
    expected.MergeFrom(numbers)
    assert server.requests == [expected]
