import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.device import native
from shared.device.native import BASELINES, build_library, prebuild_library
from shared.errors import FailedPrecondition
from tests.waiting import HANG_S, wait_until

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(not COMPILER, reason="Needs g++.")

SOURCE = 'template <int value> int same() { return value; } extern "C" int answer() { return same<ANSWER>(); }'
OPTIONS = ["-O1", "-DANSWER=42"]

# A compiler that begins its output, adds a line to a log, and continues once the log has `together` lines.
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
library = build_library(sys.argv[1], sys.argv[2:-1], Path(sys.argv[-1]))
print(ctypes.CDLL(str(library)).answer(), library)
"""


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def install_compiler(folder: Path, together: int = 1) -> Path:
    """Puts a compiler that logs its calls into a folder, and returns the log."""
    log = folder / "log"
    log.touch()
    script = folder / "g++"
    script.write_text(_COMPILER.format(log=log, together=together, compiler=COMPILER))
    script.chmod(0o755)
    return log


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_a_source_is_compiled_to_a_library(tmp_path: Path) -> None:
    cache = tmp_path / "not" / """there yet: %d " o'ne $HOME `x` ü"""
    library = build_library(SOURCE, OPTIONS, cache)
    assert answer(library) == 42
    assert list(cache.iterdir()) == [library], "Nothing else is left."


def test_a_library_is_built_once(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder)
    first = build_library(SOURCE, OPTIONS, tmp_path)
    written = first.stat().st_mtime_ns
    assert build_library(SOURCE, OPTIONS, tmp_path) == first
    assert first.stat().st_mtime_ns == written
    assert log.read_text() == "begun\n"


def test_two_processes_can_build_the_same_library_at_once(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder, together=2)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", _BUILD, SOURCE, *OPTIONS, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = {process.communicate(timeout=HANG_S)[0] for process in processes}
    (library,) = cache.iterdir()
    assert answers == {f"42 {library}\n"}
    assert log.read_text() == "begun\nbegun\n"


def test_the_output_of_a_killed_build_is_not_used(tmp_path: Path, bin_folder: Path) -> None:
    log = install_compiler(bin_folder, together=99)
    cache = tmp_path / "cache"
    with subprocess.Popen(
        [sys.executable, "-c", _BUILD, SOURCE, *OPTIONS, str(cache)], start_new_session=True
    ) as building:
        wait_until(lambda: log.read_text() != "")
        os.killpg(building.pid, signal.SIGKILL)
    install_compiler(bin_folder)
    assert answer(build_library(SOURCE, OPTIONS, cache)) == 42


def test_the_processor_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, calls = native._processor(), []

    def reading() -> str:
        calls.append(1)
        return processor

    monkeypatch.setattr(native, "_processor", reading)
    build_library(SOURCE, OPTIONS, tmp_path)
    assert len(calls) == 1


def test_a_library_depends_on_source_options_and_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = [
        build_library(SOURCE, OPTIONS, tmp_path),
        build_library(SOURCE + "\n", OPTIONS, tmp_path),
        build_library(SOURCE, ["-O1", "-DANSWER=43"], tmp_path),
    ]
    monkeypatch.setattr(native, "_processor", lambda: "another one")
    libraries.append(build_library(SOURCE, OPTIONS, tmp_path))
    assert len(set(libraries)) == 4
    assert answer(libraries[0]) == answer(libraries[3]) == 42
    assert answer(libraries[2]) == 43


def test_a_missing_compiler_is_an_error_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FailedPrecondition, match=r"^No C\+\+ compiler is installed; install one of g\+\+, c\+\+, clang\+\+\.$"
    ):
        build_library(SOURCE, OPTIONS, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_source_that_does_not_compile_leaves_no_files(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match=r"(?s)returned non-zero exit status 1.*error: "):
            build_library("int answer(void) { return", [], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def prebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of prebuilt libraries, with one that answers 42 on each kind of processor."""
    if platform.machine() not in BASELINES:
        pytest.skip("There are no baselines for this architecture.")
    folder = tmp_path / "prebuilt"
    monkeypatch.setattr(native, "PREBUILT", folder)
    prebuild_library(SOURCE, [*OPTIONS, "-march=native"], folder)
    return folder


def set_features(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    monkeypatch.setattr(native, "_processor", lambda: " ".join(features))


def test_a_prebuilt_library_needs_no_compiler(prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    library = build_library(SOURCE, [*OPTIONS, "-march=native"], tmp_path / "cache")
    assert answer(library) == 42
    assert library.parent == prebuilt and not (tmp_path / "cache").exists()


def test_the_fastest_prebuilt_library_that_the_processor_can_run_is_taken(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []
    for baseline in BASELINES[platform.machine()]:
        set_features(monkeypatch, baseline.features | {"another"})
        chosen.append(build_library(SOURCE, [*OPTIONS, "-march=native"], tmp_path / "cache"))
    assert set(chosen) == set(prebuilt.iterdir()) and len(set(chosen)) == len(chosen)


def test_any_processor_of_the_architecture_finds_a_prebuilt_library(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    set_features(monkeypatch, frozenset())
    assert answer(build_library(SOURCE, [*OPTIONS, "-march=native"], tmp_path / "cache")) == 42


def test_code_for_any_processor_is_prebuilt_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "PREBUILT", tmp_path)
    prebuild_library(SOURCE, OPTIONS, tmp_path)
    (library,) = tmp_path.iterdir()
    assert answer(build_library(SOURCE, OPTIONS, tmp_path / "cache")) == 42
    assert library == build_library(SOURCE, OPTIONS, tmp_path / "cache")
