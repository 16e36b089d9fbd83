import json
import subprocess
import sys
from pathlib import Path

import pytest

from shared.device.accelerator import Accelerator, memory, report
from shared.device.machine import cores, cpu_threads

pytestmark = pytest.mark.slow

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Only on Linux has MLX such a folder.")

_PREPARE = """
import json, os, sys, tempfile
from pathlib import Path
before = tempfile.gettempdir()
from shared.device.accelerator import memory, prepare, report
assert "mlx.core" not in sys.modules
accelerator = prepare(Path(sys.argv[1]))
assert prepare(Path(sys.argv[1])) is accelerator
import mlx.core as mx
scale = mx.compile(lambda x: mx.exp(x) * 2)
print(json.dumps({
    "temporary": os.environ["TMPDIR"],
    "python_temporary_kept": tempfile.gettempdir() == before,
    "two": scale(mx.zeros((1,))).item(),
    "report": report(accelerator),
}), flush=True)
if sys.argv[2:]:
    input()
"""


def _prepare(cache: Path, *, stays: bool = False) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _PREPARE, str(cache), *(["stay"] if stays else [])]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen[str]) -> dict[str, object]:
    output, errors = process.communicate("\n")
    assert process.returncode == 0, errors
    return dict(json.loads(output))


@linux_only
def test_concurrent_processes_compile_in_separate_folders(tmp_path: Path) -> None:
    with _prepare(tmp_path, stays=True) as first:
        assert first.stdout is not None
        ready = json.loads(first.stdout.readline())
        second = _answer(_prepare(tmp_path))
        first.communicate("\n")
    third = _answer(_prepare(tmp_path))
    assert ready["temporary"] == third["temporary"] == str(tmp_path / "kernels-0")
    assert second["temporary"] == str(tmp_path / "kernels-1")
    assert third["python_temporary_kept"]
    assert third["two"] == 2.0


@linux_only
def test_a_kernel_of_a_killed_compiler_is_compiled_again(tmp_path: Path) -> None:
    _answer(_prepare(tmp_path))
    (library,) = (tmp_path / "kernels-0").rglob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert _answer(_prepare(tmp_path))["two"] == 2.0
    modified = library.stat().st_mtime_ns
    assert _answer(_prepare(tmp_path))["two"] == 2.0
    assert library.stat().st_mtime_ns == modified, "A complete kernel is kept."


def test_memory_counts_arrays() -> None:
    import mlx.core as mx

    before = memory()
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    after = memory()
    assert after.active_bytes - before.active_bytes >= array.nbytes
    assert after.peak_bytes >= after.active_bytes
    assert after.resident_bytes > array.nbytes


def test_the_report_names_the_threads_and_a_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = Accelerator("A processor", "cpu", "1.0", 2**34, Path(), threads=7)
    assert {"A processor", "16.0 GiB", "7 for training (OMP_NUM_THREADS)"} <= {
        line[14:] for line in report(cpu).splitlines()
    }
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "none. No C++ compiler is installed; install one of g++, c++, clang++." in report(cpu)


def test_the_report_of_a_gpu_has_its_speed() -> None:
    assert "GFLOP/s" in report(Accelerator("A GPU", "metal", "1.0", 2**34, Path()))


@pytest.mark.parametrize(("limit", "threads"), [("3", 3), ("none", None), ("0", None)])
def test_the_caller_computes_in_as_many_threads_as_openmp(
    limit: str, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert cpu_threads() == (threads or cores())
