import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.device.accelerator import Accelerator, memory, report

pytestmark = pytest.mark.slow

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Only Linux needs a BLAS and a compiler cache.")

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
    "blas": accelerator.blas,
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


@linux_only
def test_a_fast_blas_is_found_and_reported(tmp_path: Path) -> None:
    answer = _answer(_prepare(tmp_path))
    assert "OpenBLAS" in str(answer["blas"])
    assert "fp32 product" in str(answer["report"])


@linux_only
def test_mlx_finds_the_fast_blas_first() -> None:
    # MLX's own BLAS has this symbol too, but not in the global scope.
    assert ctypes.CDLL(None).cblas_sgemm


_WITHOUT_THE_SYSTEMS = """
import sys
from pathlib import Path
import shared.device.blas
from shared.device.accelerator import prepare
shared.device.blas._SYSTEM_LIBRARIES = ()
print(prepare(Path(sys.argv[1])).blas)
"""


@linux_only
def test_the_blas_of_the_wheel_is_loaded_through_a_forwarder_that_is_built_once(tmp_path: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", _WITHOUT_THE_SYSTEMS, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == ("OpenBLAS of the scipy-openblas32 wheel\n", "")
        (forwarder,) = tmp_path.glob("native-*.so")
    assert ctypes.CDLL(str(forwarder)).cblas_sgemm


@linux_only
@pytest.mark.parametrize(
    "lacking",
    [
        "import importlib.util; importlib.util.find_spec = lambda name: None",
        # Without a compiler, the forwarder cannot be built.
        "import os; os.environ['PATH'] = ''",
    ],
    ids=["wheel", "compiler"],
)
def test_a_missing_blas_is_logged_as_a_warning(tmp_path: Path, lacking: str) -> None:
    command = [sys.executable, "-c", f"{lacking}\n{_WITHOUT_THE_SYSTEMS}", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert "No fast BLAS was found" in done.stderr


def test_memory_counts_arrays() -> None:
    import mlx.core as mx

    before = memory()
    array = mx.zeros((1024, 1024))
    mx.eval(array)
    after = memory()
    assert after.active_bytes - before.active_bytes >= array.nbytes
    assert after.peak_bytes >= after.active_bytes
    assert after.resident_bytes > array.nbytes


def test_the_report_names_a_missing_blas() -> None:
    text = report(Accelerator("A processor", "cpu", "1.0", None, 2**34, Path()))
    assert "A processor" in text
    assert "16.0 GiB" in text
    assert "libopenblas0-pthread" in text


_THREADS = """
import os, sys
from pathlib import Path
from shared.device.accelerator import prepare
print(prepare(Path(sys.argv[1]), own_threads=True).threads, os.environ["OPENBLAS_NUM_THREADS"])
"""


@linux_only
@pytest.mark.parametrize(("limit", "threads"), [("3", "3"), ("none", None), ("0", None)])
def test_with_own_threads_the_caller_gets_the_threads_and_products_run_on_one_core(
    tmp_path: Path, limit: str, threads: str | None
) -> None:
    command = [sys.executable, "-c", _THREADS, str(tmp_path)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": limit}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert answer == [threads or str(len(os.sched_getaffinity(0))), "1"]
