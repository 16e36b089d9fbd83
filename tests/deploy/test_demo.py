import shlex
import sys
from pathlib import Path

import pytest

from deploy.commands import COMMANDS
from deploy.demo import continuation


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
