"""A fast MLX on a Linux CPU. Only tests and the benchmarks of other projects compute in MLX there.

The BLAS in MLX's wheel multiplies about fifty times slower than OpenBLAS. And every kernel that MLX compiles begins
with the same large header, so a script named g++ comes before the compiler on PATH and precompiles that once. A kernel
then takes 0.2 s instead of 0.9 s.
"""

import ctypes
import importlib
import importlib.util
import os
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from shared.atomic_file import replacing
from shared.device.native import build_library
from shared.plain_paths import plain_path

# The wheel's OpenBLAS prefixes its symbols with `scipy_`; MLX looks for the plain names.
_FORWARDER = """
extern "C" {
#define FORWARD(name, scalar, matrix)                                                                        \\
    void scipy_##name(int, int, int, int, int, int, scalar, const matrix *, int, const matrix *, int,        \\
                      scalar, matrix *, int);                                                                \\
    void name(int order, int transpose_a, int transpose_b, int m, int n, int k, scalar alpha,                \\
              const matrix *a, int lda, const matrix *b, int ldb, scalar beta, matrix *c, int ldc) {         \\
        scipy_##name(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);         \\
    }
FORWARD(cblas_sgemm, float, float)
FORWARD(cblas_dgemm, double, double)
FORWARD(cblas_cgemm, const void *, void)
}
"""
_HEADER = "mlx/backend/cpu/compiled_preamble.h"
# The beginning of the name of the script's folder.
_FOLDER = "compiler-mlx-"

# The same options as in MLX's own command: if any differs, g++ ignores the precompiled header.
_SCRIPT = """#!/bin/sh
if [ "$1" != --version ] && [ ! -f {precompiled} ]; then
    {compiler} -std=c++17 -O3 -fPIC -I{include} -x c++-header {include}/{header} -o {precompiled}.$$ &&
        mv {precompiled}.$$ {precompiled}
fi 2> /dev/null
exec {compiler} -I{folder} "$@"
"""


def speed_up_mlx(cache: Path) -> None:
    """Loads OpenBLAS, and puts the script on PATH; keeps what is built in the folder `cache`. Does nothing on a Mac.

    Call it before MLX is imported, or it has no effect.
    """
    if sys.platform == "linux":
        cache.mkdir(parents=True, exist_ok=True)
        _load_blas(cache)
        _name_mlx_plainly()
        _speed_up_compiler(plain_path(cache))


def _load_blas(cache: Path) -> None:
    """Loads the OpenBLAS of the wheel into the global symbol scope, through a forwarder."""
    wheel = importlib.util.find_spec("scipy_openblas32")
    assert wheel is not None and wheel.origin is not None, "It is locked in requirements/dev.txt."
    ctypes.CDLL(str(Path(wheel.origin).parent / "lib" / "libscipy_openblas.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(build_library(_FORWARDER, ("-O2",), cache)), mode=ctypes.RTLD_GLOBAL)


def _name_mlx_plainly() -> None:
    """Imports MLX from a plain path, because it puts its path into shell commands without escaping it."""
    # Imports only the empty package.
    package = importlib.import_module("mlx")
    folders = [Path(folder) for folder in package.__path__]
    package.__path__ = [str(plain_path(folder.parent) / folder.name) for folder in folders]


def _speed_up_compiler(cache: Path) -> None:
    """Writes the script to `cache`, a plain path, and puts it first on PATH; does nothing if g++ is missing."""
    # The parent process may have put its own script on PATH; two scripts that call each other would never end.
    path = [place for place in os.environ["PATH"].split(os.pathsep) if not Path(place).name.startswith(_FOLDER)]
    compiler = shutil.which("g++", path=os.pathsep.join(path))
    # Every folder named mlx on the search path is one of the locations.
    locations = importlib.import_module("mlx").__path__
    includes = [folder for location in locations if ((folder := Path(location, "include")) / _HEADER).is_file()]
    if compiler is None or not includes:
        return
    folder = cache / f"{_FOLDER}{version('mlx')}"
    precompiled = folder / f"{_HEADER}.gch"
    precompiled.parent.mkdir(parents=True, exist_ok=True)
    places = {"compiler": compiler, "include": includes[0], "folder": folder, "precompiled": precompiled}
    quoted = {name: shlex.quote(str(place)) for name, place in places.items()}
    with replacing(folder / "g++", mode=0o755) as script:
        script.write(_SCRIPT.format(header=_HEADER, **quoted).encode())
    os.environ["PATH"] = os.pathsep.join([str(folder), *path])
