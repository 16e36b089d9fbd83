"""A fast BLAS for MLX on a Linux CPU, about fifty times faster than the one in MLX's wheel."""

import ctypes
import importlib.util
from pathlib import Path

from shared.device.native import build_library, prebuild_library
from shared.errors import FailedPrecondition

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
_OPTIONS = ("-O2",)


def load_blas(cache: Path) -> str | None:
    """Loads OpenBLAS into the global symbol scope and returns its description, or `None` if it is not installed.

    Call it before MLX is imported, or it has no effect. Takes the system's library, or else the `scipy-openblas32`
    wheel through a forwarder, which the C compiler builds once into `cache`.
    """
    for name in _SYSTEM_LIBRARIES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL).cblas_sgemm  # noqa: B018 - raises if it is missing
        except (OSError, AttributeError):
            continue
        return f"OpenBLAS of the system ({name})"
    wheel = importlib.util.find_spec("scipy_openblas32")
    if wheel is None or wheel.origin is None:
        return None
    try:
        ctypes.CDLL(str(Path(wheel.origin).parent / "lib" / "libscipy_openblas.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(build_library(_FORWARDER, "c", _OPTIONS, cache)), mode=ctypes.RTLD_GLOBAL)
    except (OSError, FailedPrecondition):
        return None
    return "OpenBLAS of the scipy-openblas32 wheel"


def prebuild(folder: Path) -> None:
    """Builds the forwarder; raises `FailedPrecondition` as `prebuild_library` does."""
    prebuild_library(_FORWARDER, "c", _OPTIONS, folder)
