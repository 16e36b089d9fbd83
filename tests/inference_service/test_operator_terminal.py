"""The commands of operators and what they print."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from inference_service import operator_terminal
from inference_service.__main__ import app
from inference_service.operator_terminal import print_versions
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service import cli
from tests.fakes import publish_tiny_version
from tests.inference_service.operated import TOKEN, operator_tokens
from tests.inference_service.process import ROOT, Server
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

COMMANDS = ("versions", "promote", "pin", "follow", "rollback", "load", "unload")


# How an answer is printed.


def status(version: int, state: pb.VersionState, **fields: Any) -> pb.VersionStatus:
    """Returns a version that was published 4 hours ago."""
    created_at = Timestamp(seconds=round(time.time()) - 4 * 3600)
    defaults: dict[str, Any] = {
        "claimed_loss": 3.25,
        "validation_loss": 3.3,
        "bits_per_byte": 1.5,
        "step": 100 * version,
        "created_at": created_at,
        "digest": "0123abcd",
    }
    return pb.VersionStatus(version=version, state=state, **(defaults | fields))


# Every kind of cell, as wide as possible.
WIDE = pb.ListVersionsResponse(
    versions=[
        status(
            *(1, pb.VERSION_STATE_SERVING),
            labels=["best", "stable", "pinned:1"],
            streams=12,
            held=True,
            memory_bytes=12 << 30,
            measured_loss=3.0,
        ),
        status(2, pb.VERSION_STATE_AVAILABLE),
        status(3, pb.VERSION_STATE_RESIDENT, streams=1, memory_bytes=12 << 20, measured_loss=10.12344),
        status(4, pb.VERSION_STATE_RESIDENT, held=True, memory_bytes=12 << 20, measured_loss=3.0),
        status(
            *(1234, pb.VERSION_STATE_REFUSED),
            labels=["latest"],
            reason="loss_mismatch: it claims a held-out loss of 3.2500 nats a token, but has 3.7500 as served",
            measured_loss=3.75,
        ),
    ],
    policy="pinned:1",
    notices=["The policy stays pinned:1: its file cannot be understood."],
)


ROWS = (
    "version     step  state      held-out loss  bits per byte  as served   streams    memory  age  labels",
    "      1      100  serving           3.3000         1.5000    -0.2500  12, held  12.0 GiB  4 h  "
    "best, stable, pinned:1",
    "      2      200  available         3.3000         1.5000                                 4 h",
    "      3      300  resident          3.3000         1.5000    +6.8734         1    12 MiB  4 h",
    "      4      400  resident          3.3000         1.5000    -0.2500      held    12 MiB  4 h",
    "   1234  123,400  refused           3.3000         1.5000    +0.5000                      4 h  latest",
)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Returns the lines that an answer has on a terminal, without styles; without `columns`, in a file."""

    def show(answer: pb.ListVersionsResponse, columns: int | None = None) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns or 80))
        monkeypatch.setenv("FORCE_COLOR" if columns else "NO_COLOR", "1")
        print_versions(answer)
        output = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        return [line.rstrip() for line in output.splitlines()]

    return show


@pytest.mark.parametrize("columns", [None, 120])
def test_each_version_has_one_row(show: Callable[..., list[str]], columns: int | None) -> None:
    assert show(WIDE, columns) == [
        *ROWS,
        "version 1234: loss_mismatch: it claims a held-out loss of 3.2500 nats a token, but has 3.7500 as served",
        "The policy stays pinned:1: its file cannot be understood.",
        "policy: pinned:1",
    ]


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_has_fewer_columns_and_wraps_labels(show: Callable[..., list[str]], columns: int) -> None:
    lines = show(WIDE, columns)
    table = lines[: lines.index(next(line for line in lines if line.startswith("version 1234")))]
    assert max(len(line) for line in table) <= columns
    assert "…" not in "".join(table) and "held-out loss  bits per byte" in table[0]
    assert [line.split()[0] for line in table if line[:7].strip()] == ["version", "1", "2", "3", "4", "1234"]
    assert re.findall(r"(?:best|stable|pinned:1|latest)(?=,|\s|$)", " ".join(table)) == [
        *("best", "stable", "pinned:1", "latest")
    ]


def test_json_includes_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    print_versions(WIDE, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert [row["version"] for row in rows] == [1, 2, 3, 4, 1234]
    assert rows[-1]["reason"].startswith("loss_mismatch") and rows[-1]["state"] == "refused"
    assert (rows[0]["held_out_loss"], rows[0]["measured_loss"], rows[1]["measured_loss"]) == (3.3, 3.0, None)


def test_evaluations_by_the_newest_method_compare_and_others_stand_in_parentheses(
    show: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluated(bits_per_byte: float, method: str, measured_at: int) -> pb.TextQuality:
        at = Timestamp(seconds=measured_at)
        return pb.TextQuality(method_digest=method, bits_per_byte=bits_per_byte, measured_at=at, tokens=1000)

    answer = pb.ListVersionsResponse(
        versions=[
            status(1, pb.VERSION_STATE_AVAILABLE, evaluation=evaluated(1.6, "aa", 100)),
            status(2, pb.VERSION_STATE_AVAILABLE),
            status(3, pb.VERSION_STATE_SERVING, evaluation=evaluated(1.5, "bb", 200), labels=["best"]),
        ],
        policy="best",
        best_by=pb.BEST_BY_EVALUATION,
    )
    heading, *rows, rule, policy = show(answer)
    place = slice(heading.index("evaluated") - 2, heading.index("evaluated") + len("evaluated"))
    assert [row[place].strip() for row in rows] == ["(1.6000)", "", "1.5000"]
    assert (rule, policy) == ("best by: evaluation", "policy: best")
    print_versions(answer, as_json=True)
    first, second, _ = (row["evaluation"] for row in json.loads(capsys.readouterr().out))
    assert first == {"method_digest": "aa", "bits_per_byte": 1.6, "measured_at": 100, "tokens": 1000}
    assert second is None


def test_an_empty_list_says_when_the_first_version_comes(show: Callable[..., list[str]]) -> None:
    assert show(pb.ListVersionsResponse(policy="latest")) == [
        "No version yet: the first one comes with the first evaluation of a training job.",
        "policy: latest",
    ]


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ([], "The policy is stable. No version serves yet."),
        ([status(1, pb.VERSION_STATE_SERVING, labels=["stable"])], "The policy is stable. Version 1 serves now."),
        ([status(1, pb.VERSION_STATE_SERVING)], "The policy is stable. Version 1 serves now."),
        (
            [status(1, pb.VERSION_STATE_SERVING), status(2, pb.VERSION_STATE_LOADING, labels=["best", "stable"])],
            "The policy is stable. Version 2 (loading) has this label. Version 1 serves now.",
        ),
        (
            [status(2, pb.VERSION_STATE_WAITING, labels=["stable"])],
            "The policy is stable. Version 2 (waiting) has this label. No version serves yet.",
        ),
    ],
)
def test_a_policy_is_described_with_what_serves(versions: list[pb.VersionStatus], sentence: str) -> None:
    assert operator_terminal.describe_policy(pb.ListVersionsResponse(versions=versions, policy="stable")) == sentence


def test_an_unloaded_version_is_described_with_its_running_streams() -> None:
    leaving = status(3, pb.VERSION_STATE_RESIDENT, streams=2)
    assert operator_terminal.describe_unloaded(leaving) == (
        "Version 3 leaves memory when its last stream ends; 2 of them run now."
    )


def test_a_rollback_is_described_with_the_state_of_the_new_version() -> None:
    assert operator_terminal.describe_rollback(status(3, pb.VERSION_STATE_LOADING)) == (
        "Version 3 (loading) serves as soon as it is in memory."
    )
    assert operator_terminal.describe_rollback(status(3, pb.VERSION_STATE_SERVING)) == "Version 3 serves now."


# The commands.


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
