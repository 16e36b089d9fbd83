"""A fast BLAS for MLX on a Linux CPU: the library that MLX's wheel brings multiplies about fifty times slower."""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# Fedora's plain libopenblas is its single-threaded build, so the threaded names come first.
_SYSTEM_LIBRARIES = ("libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so.0")

# The wheel's OpenBLAS prefixes its symbols with `scipy_`; MLX looks for the plain names.
_FORWARDER = """
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
"""


def load_blas(cache: Path) -> str | None:
    """Loads OpenBLAS into the global symbol scope and says which; `None` where there is none.

    The system's library, else the one of the `scipy-openblas32` wheel through a forwarder that the C compiler builds
    once into `cache`. It takes effect only before MLX is imported.
    """
    for name in _SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL).cblas_sgemm  # noqa: B018 - raises where it is missing
        except (OSError, AttributeError):
            continue
        return f"OpenBLAS of the system ({name})"
    wheel = importlib.util.find_spec("scipy_openblas32")
    if wheel is None or wheel.origin is None:
        return None
    try:
        ctypes.CDLL(str(Path(wheel.origin).parent / "lib" / "libscipy_openblas.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(_build_forwarder(cache)), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.SubprocessError):
        return None
    return "OpenBLAS of the scipy-openblas32 wheel"


def _build_forwarder(cache: Path) -> Path:
    machine = os.uname().machine
    library = cache / f"blas-{machine}-{hashlib.sha256(_FORWARDER.encode()).hexdigest()[:12]}.so"
    if library.exists():
        return library
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("There is no C compiler.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / library.name
        command = [compiler, "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(built)]
        subprocess.run(command, input=_FORWARDER.encode(), check=True, capture_output=True, timeout=60)
        built.replace(library)
    return library
