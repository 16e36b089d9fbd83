import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.device import native
from shared.device.native import build_library
from shared.errors import FailedPrecondition
from tests.waiting import HANG_S

GCC = shutil.which("gcc")
pytestmark = pytest.mark.skipif(not (GCC and shutil.which("g++")), reason="There is no compiler.")

C = "int answer(void) { return ANSWER; }"
CPP = 'template <int value> int same() { return value; } extern "C" int answer() { return same<ANSWER>(); }'
OPTIONS = ["-O1", "-DANSWER=42"]

# A compiler that begins its output, writes a line to a log, and goes on when there are as many lines as it is told.
_COMPILER = """#!/bin/sh
for output; do :; done
echo half > "$output"
echo begun >> {log}
while [ "$(wc -l < {log})" -lt {together} ]; do sleep 0.01; done
exec {compiler} "$@"
"""

_BUILD = """
import ctypes, sys
from pathlib import Path
from shared.device.native import build_library
library = build_library(sys.argv[1], "c", sys.argv[2:-1], Path(sys.argv[-1]))
print(ctypes.CDLL(str(library)).answer(), library)
"""


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def install_compiler(folder: Path, together: int = 1) -> Path:
    """Puts a compiler that logs its calls into a folder; the log."""
    log = folder / "log"
    log.touch()
    script = folder / "gcc"
    script.write_text(_COMPILER.format(log=log, together=together, compiler=GCC))
    script.chmod(0o755)
    return log


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder before all others on the search path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize(("language", "source"), [("c", C), ("c++", CPP)], ids=["c", "c++"])
def test_source_becomes_a_library(tmp_path: Path, language: str, source: str) -> None:
    cache = tmp_path / "not" / """there yet: %d " o'ne $HOME `x` ü"""
    library = build_library(source, language, OPTIONS, cache)
    assert answer(library) == 42
    assert list(cache.iterdir()) == [library], "Nothing else stays."


def test_a_library_is_built_once(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder)
    first = build_library(C, "c", OPTIONS, tmp_path)
    written = first.stat().st_mtime_ns
    assert build_library(C, "c", OPTIONS, tmp_path) == first
    assert first.stat().st_mtime_ns == written
    assert log.read_text() == "begun\n"


def test_two_processes_that_build_at_a_time_do_not_disturb_each_other(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder, together=2)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", _BUILD, C, *OPTIONS, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=HANG_S)[0] for process in processes}
    (library,) = cache.iterdir()
    assert answers == {f"42 {library}\n"}
    assert log.read_text() == "begun\nbegun\n"


def test_what_a_killed_build_left_is_not_taken_for_a_library(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder, together=99)
    cache = tmp_path / "cache"
    with subprocess.Popen([sys.executable, "-c", _BUILD, C, *OPTIONS, str(cache)], start_new_session=True) as building:
        deadline = time.monotonic() + HANG_S
        while not log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(building.pid, signal.SIGKILL)
    install_compiler(bin_folder)
    assert answer(build_library(C, "c", OPTIONS, cache)) == 42


def test_another_source_language_option_or_processor_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = [
        build_library(C, "c", OPTIONS, tmp_path),
        build_library(C + "\n", "c", OPTIONS, tmp_path),
        build_library(C, "c++", OPTIONS, tmp_path),
        build_library(C, "c", ["-O1", "-DANSWER=43"], tmp_path),
    ]
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    libraries.append(build_library(C, "c", OPTIONS, tmp_path))
    assert len(set(libraries)) == 5
    assert answer(libraries[0]) == answer(libraries[4]) == 42
    assert answer(libraries[3]) == 43


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("c", "There is no c compiler: install one of gcc, cc, clang."),
        ("c++", "There is no c++ compiler: install one of g++, c++, clang++."),
    ],
)
def test_no_compiler_is_said_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, message: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition) as raised:
        build_library(C, language, OPTIONS, tmp_path / "cache")
    assert str(raised.value) == message
    assert not (tmp_path / "cache").exists()


def test_source_that_does_not_compile_leaves_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"(?s)returned non-zero exit status 1.*error: "):
            build_library("int answer(void) { return", "c", [], tmp_path)
    assert list(tmp_path.iterdir()) == []
