import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.commands import COMMANDS
from deploy.demo import continuation
from deploy.launch import holder
from tests.waiting import HANG_S, wait_until


@pytest.mark.parametrize("is_on_path", [True, False])
def test_the_end_names_the_folder_the_page_and_commands_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    for name in ("python", "gptloop"):
        (tmp_path / "bin" / name).touch(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin") if is_on_path else "")
    text = continuation(tmp_path / "my var" / "demo", "http://127.0.0.1:8080/")
    assert "The model stays in 'my var/demo' until the next demo" in text
    assert text.endswith("the page is at http://127.0.0.1:8080/")
    export, *lines = [shlex.split(line) for line in text.splitlines() if line.startswith("    ")]
    assert export == ["export", "GPTLOOP_VAR=my var/demo"]
    assert {line[0] for line in lines} == {"gptloop" if is_on_path else "bin/gptloop"}
    assert all(line[1] in COMMANDS for line in lines)


def test_a_folder_elsewhere_is_named_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    assert "GPTLOOP_VAR=" + str(tmp_path).removeprefix("/") in continuation(tmp_path, "")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert f"GPTLOOP_VAR={tmp_path}/var" in continuation(tmp_path / "var", "")


def test_what_runs_in_its_folder_is_left_alone(tmp_path: Path) -> None:
    lock = tmp_path / "demo" / "run" / "supervisord.lock"
    lock.parent.mkdir(parents=True)
    state = tmp_path / "demo" / "registry" / "state"
    state.parent.mkdir()
    state.touch()
    other = subprocess.Popen([sys.executable, "-m", "deploy.launch", str(lock), "sleep", "600"])
    try:
        wait_until(lambda: holder(lock) == other.pid)
        environment = {**os.environ, "GPTLOOP_VAR": str(tmp_path)}
        command = [str(Path(sys.executable).with_name("gptloop")), "demo"]
        demo = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
        assert demo.returncode == 1, demo.stderr
        assert f"`GPTLOOP_VAR={tmp_path / 'demo'} gptloop down`" in demo.stdout
        assert other.poll() is None
        assert state.exists()
    finally:
        other.kill()
        other.wait()
