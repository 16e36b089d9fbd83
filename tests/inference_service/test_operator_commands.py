"""The commands of operators, against a real server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inference_service.__main__ import app
from shared.service import cli
from tests.fakes import publish_tiny_version
from tests.inference_service.operated import TOKEN, operator_tokens
from tests.inference_service.process import ROOT, Server
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

COMMANDS = ("versions", "promote", "pin", "follow", "rollback", "load", "unload")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with three versions, of which the second is the best."""
    var = tmp_path_factory.mktemp("server") / "var"
    server = Server(var, GPTLOOP_OPERATOR_TOKENS=operator_tokens(var))
    try:
        for bits_per_byte in (3.0, 1.0, 2.0):
            publish_tiny_version(server.registry, bits_per_byte)
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines
        assert "Traceback" not in "".join(server.lines), server.lines


class Operator:
    """Runs commands with a token."""

    def __init__(self, server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._token = server.var / "token"
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        host, port = server.address.rsplit(":", 1)
        monkeypatch.setenv("GPTLOOP_INFERENCE_HOST", host)
        monkeypatch.setenv("GPTLOOP_INFERENCE_PORT", port)
        monkeypatch.setenv("GPTLOOP_TOKEN_FILE", str(self._token))
        self.have(TOKEN)

    def have(self, token: str) -> None:
        """Writes the token into the file; no token means no file."""
        if token:
            self._token.write_text(f"operator {token}\n")
        else:
            self._monkeypatch.delenv("GPTLOOP_TOKEN_FILE")

    def type(self, *arguments: str) -> tuple[int, str, str]:
        """Runs a command; returns its exit code, standard output and standard error."""
        self._monkeypatch.setattr(sys, "argv", ["inference_service", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run(app)
        output, errors = self._capsys.readouterr()
        return int(ended.value.code or 0), output, errors

    def see(self, *arguments: str) -> str:
        """Runs a command that succeeds; returns what it prints."""
        code, output, errors = self.type(*arguments)
        assert (code, errors) == (0, ""), errors
        return output

    def rows(self) -> dict[int, str]:
        """Returns a summary of each row by version: state, labels, and what keeps it in memory."""
        rows = json.loads(self.see("versions", "--json"))
        return {
            row["version"]: " ".join(
                filter(None, (row["state"], ", ".join(row["labels"]), str(row["streams"] or ""), "held" * row["held"]))
            )
            for row in rows
        }


@pytest.fixture
def operator(server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator of a server on which version 2 serves as the best one."""
    operator = Operator(server, capsys, monkeypatch)
    operator.see("follow", "best")
    wait_until(lambda: operator.rows()[2].startswith("serving"))
    return operator


def test_versions_are_listed(operator: Operator) -> None:
    assert operator.see("versions").endswith("\npolicy: best\n")
    rows = operator.rows()
    newest = max(rows)
    assert sorted(rows) == list(range(1, newest + 1))
    assert rows[1].startswith(("available", "resident"))
    assert rows[2].startswith("serving best") and rows[newest].endswith("latest")


def test_pin_and_follow_print_which_version_serves(operator: Operator) -> None:
    printed = operator.see("pin", "1")
    assert re.fullmatch(
        r"The policy is pinned:1\. (Version 1 \((available|loading|resident)\) has this label\. Version 2|Version 1) "
        r"serves now\.\n",
        printed,
    )
    wait_until(lambda: operator.rows()[1] == "serving pinned:1")
    assert operator.see("pin", "1") == "The policy is pinned:1. Version 1 serves now.\n"
    assert operator.see("versions").endswith("policy: pinned:1\n")
    assert operator.see("follow", "best").startswith("The policy is best. ")
    wait_until(lambda: operator.rows()[2] == "serving best")
    assert operator.see("follow", "best") == "The policy is best. Version 2 serves now.\n"


def test_promote_prints_the_stable_version(operator: Operator) -> None:
    assert operator.see("promote", "2") == "Version 2 (serving) is the stable one now.\n"
    assert operator.rows()[2] == "serving best, stable"


def test_load_and_unload_print_what_is_in_memory(operator: Operator) -> None:
    assert re.fullmatch(
        r"Version 1 \(resident\) is in memory: \d\.\d MiB, held-out loss \d\.\d{4}\.\n", operator.see("load", "1")
    )
    assert operator.rows()[1] == "resident held"
    assert operator.see("unload", "1") == "Version 1 has left memory.\n"
    assert operator.rows()[1] == "available"


def test_a_version_that_was_rolled_back_stays_refused_until_it_is_loaded(server: Server, operator: Operator) -> None:
    bad = publish_tiny_version(server.registry, 0.5).version
    wait_until(lambda: operator.rows()[bad].startswith("serving"))
    assert re.fullmatch(
        r"Version 2 (serves now|\((available|loading|resident)\) serves as soon as it is in memory)\.\n",
        operator.see("rollback"),
    )
    wait_until(lambda: operator.rows()[2].startswith("serving"))
    assert operator.rows()[bad] == "refused"
    assert f"\nversion {bad}: rolled_back: an operator rolled it back\n" in operator.see("versions")
    sentence = f"error: Version {bad} cannot serve: an operator rolled it back.\n"
    assert operator.type("pin", str(bad)) == (1, "", sentence)
    # It is the best version, so it serves again.
    assert operator.see("load", str(bad)).startswith(f"Version {bad} (")
    wait_until(lambda: operator.rows()[bad].startswith("serving"))
    operator.see("rollback", "1")
    wait_until(lambda: operator.rows()[1].startswith("serving"))
    assert operator.see("versions").endswith("policy: pinned:1\n")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("load", "99"), 1, "There is no version 99; the labels are best"),
        (("promote", "99"), 1, "There is no version 99"),
        (("pin", "99"), 1, "There is no version 99"),
        (("rollback", "99"), 1, "There is no version 99"),
        (("rollback", "2"), 1, "Version 2 serves already."),
        (("unload", "2"), 1, "Version 2 serves: pin another one, or roll back."),
        (("unload", "3"), 1, "Version 3 is not in memory."),
        (
            ("follow", "newest"),
            2,
            "'newest' is not a label; the labels are best, latest, stable, run:<name> and pinned:<version>.",
        ),
        (("load", "99999999999999999999"), 2, "A parameter cannot be sent: Value out of range"),
        (("versions", "--address", "127.0.0.1:1"), 1, "No server answers at 127.0.0.1:1: start it with `gptloop up`."),
    ],
)
def test_an_error_is_one_sentence(operator: Operator, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    ended, output, errors = operator.type(*arguments)
    assert (ended, output) == (code, "")
    assert errors.startswith(f"error: {sentence}")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("token", ["", "close"])
def test_without_the_token_each_command_names_the_setting(operator: Operator, token: str) -> None:
    operator.have(token)
    for name in COMMANDS:
        arguments = {"versions": (), "rollback": (), "follow": ("latest",)}.get(name, ("1",))
        code, output, errors = operator.type(name, *arguments)
        assert (code, output) == (1, "")
        assert errors.startswith(f"error: This call has {'the wrong' if token else 'no'} bearer token")
        assert "put a valid one into the file that GPTLOOP_TOKEN_FILE names" in errors
        assert len(errors.splitlines()) == 1


def test_a_token_that_metadata_cannot_carry_is_reported_in_one_sentence(operator: Operator) -> None:
    operator.have("öffne-dich")
    code, output, errors = operator.type("versions")
    assert (code, output) == (2, "")
    assert errors.startswith("error: The token in GPTLOOP_TOKEN_FILE contains a character that metadata cannot carry")
    assert "dich" not in errors


def test_the_command_as_a_process(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    for file, code in ((str(tmp_path / "token"), 0), ("", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "inference_service", "versions", "--address", server.address],
            cwd=ROOT,
            env={**os.environ, "GPTLOOP_TOKEN_FILE": file},
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == code
        printed, other = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
        assert printed.startswith("version  step  state" if code == 0 else "error: This call has no bearer token")
        assert other == ""


def test_an_empty_registry_has_no_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path / "var", GPTLOOP_OPERATOR_TOKENS=operator_tokens(tmp_path / "var"))
    try:
        operator = Operator(server, capsys, monkeypatch)
        assert operator.see("versions") == (
            "No version yet: the first one comes with the first evaluation of a training job.\n"
            "best by: training\npolicy: best\n"
        )
        assert operator.see("follow", "latest") == "The policy is latest. No version serves yet.\n"
        assert operator.type("pin", "1") == (1, "", "error: There is no version 1; the registry is still empty.\n")
        assert operator.type("rollback") == (1, "", "error: No version serves.\n")
    finally:
        assert server.end() == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    text = " ".join(done.output.replace("│", " ").split())
    assert f"Example: gptloop {name}" in text or f"Examples: gptloop {name}" in text
    assert "GPTLOOP_INFERENCE_HOST" in text
    words = {
        "versions": "available",
        "promote": "label stable",
        "pin": "until follow names a label again",
        "follow": "fewest bits per byte",
        "rollback": "Only load gives it another chance",
        "load": "examined again",
        "unload": "last stream has ended",
    }
    assert words[name] in text
