import importlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ODD = """sp ace %d " o'ne $HOME `x` ü"""
PROGRAM = """
import sys
from pathlib import Path
from shared.device import accelerator
accelerator.prepare(Path(sys.argv[1]))
import mlx.core as mx
twice = mx.compile(lambda x: mx.abs(x * 2 + 1) * 3 - 1)
print(twice(mx.array([1.0, -2.0])).tolist())
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="MLX calls g++ on Linux only"),
]


def run(cache: Path, search_path: str = ".", path: str = os.environ["PATH"]) -> None:
    """Compiles a kernel in a separate process."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(cache)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": search_path, "PATH": path},
        # Scripts that call each other would never end.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (60, 60)),
        capture_output=True,
        text=True,
    )
    assert ended.stdout.strip() == "[8.0, 8.0]", ended.stderr


def test_kernels_are_compiled_with_the_precompiled_header(tmp_path: Path) -> None:
    for _ in range(2):
        run(tmp_path)
    (header,) = tmp_path.rglob("*.gch")
    (kernel,) = tmp_path.rglob("*.cpp")
    (script,) = tmp_path.rglob("g++")
    # -H marks a precompiled header that is used with an exclamation mark.
    includes = subprocess.run(
        [script, "-std=c++17", "-O3", "-fPIC", "-H", "-fsyntax-only", kernel], capture_output=True, text=True
    )
    assert f"! {header}" in includes.stderr


def test_a_child_process_with_the_same_folder_compiles(tmp_path: Path) -> None:
    run(tmp_path)
    (script,) = tmp_path.rglob("g++")
    for kernel in tmp_path.rglob("*.so"):
        kernel.unlink()
    run(tmp_path, path=f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert str(script) not in script.read_text()


def test_the_cache_and_mlx_may_be_in_folders_with_any_name(tmp_path: Path) -> None:
    packages = tmp_path / ODD
    packages.mkdir()
    (mlx,) = importlib.import_module("mlx").__path__
    (packages / "mlx").symlink_to(mlx)
    cache = tmp_path / "state" / ODD
    run(cache, f"{packages}{os.pathsep}.")
    assert list(cache.rglob("*.so"))
