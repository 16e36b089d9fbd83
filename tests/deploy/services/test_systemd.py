import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.services.installation import PROCESSES, Installation
from deploy.services.systemd import Systemd
from shared.service.settings import Directories
from tests.waiting import HANG_S

_FOLDER = """/sp ace %h %Q "quo'ted" $HOME \\x ü"""


def _write(home: Path, installation: Installation) -> list[Path]:
    files = Systemd({"HOME": str(home)}).files(installation)
    for path, contents in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    return list(files)


def _verify(units: list[Path], runtime: Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(
        ["systemd-analyze", "--user", "verify", *units],
        env=os.environ | {"XDG_RUNTIME_DIR": str(runtime)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


def test_systemd_understands_every_unit(tmp_path: Path) -> None:
    installation = Installation(Directories(Path(_FOLDER)), {"GPTLOOP_VAR": _FOLDER, "PATH": "/bin"}, PROCESSES)
    verified = _verify(_write(tmp_path, installation), tmp_path)
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "finding"),
    [
        ("KillMode=mixed", "KillMode=gentle", "gentle"),
        ("RestartSec=", "RestartSecs=", "RestartSecs"),
    ],
)
def test_systemd_finds_a_planted_fault(tmp_path: Path, right: str, wrong: str, finding: str) -> None:
    (unit, *_) = _write(tmp_path, Installation(Directories(tmp_path), {}, PROCESSES))
    unit.write_text(unit.read_text().replace(right, wrong))
    verified = _verify([unit], tmp_path)
    assert finding in verified.stderr


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1))
def test_the_settings_of_a_unit_are_read_back(text: str) -> None:
    written = {"GPTLOOP_VAR": text, "PATH": "/usr/bin:/bin"}
    systemd = Systemd({"HOME": "/home"})
    files = systemd.files(Installation(Directories(Path("/var")), written, PROCESSES[:1]))
    (unit,) = (contents for path, contents in files.items() if path.suffix == ".service")
    assert systemd.settings(unit) == written


def test_the_target_wants_what_is_installed(tmp_path: Path) -> None:
    files = Systemd({"XDG_CONFIG_HOME": str(tmp_path)}).files(Installation(Directories(tmp_path), {}, PROCESSES[1:]))
    target = files[tmp_path / "systemd/user/gptloop.target"].decode()
    assert "Wants=gptloop-trainer.service gptloop-inference.service gptloop-worker.service\n" in target


@pytest.mark.parametrize(
    ("answer", "runs"), [("running", True), ("degraded", True), ("starting", True), ("offline", False), ("", False)]
)
def test_a_user_without_a_systemd_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, runs: bool
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\necho {answer}\n[ '{answer}' = running ]\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Systemd({}).is_running() == runs
