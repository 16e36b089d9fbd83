"""The device that MLX computes on, and what must happen before MLX is imported."""

import fcntl
import functools
import gc
import os
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Literal

from shared.device.machine import array_cache_bytes, cpu_threads, memory_limit_bytes
from shared.device.native import NO_COMPILER, find_compiler
from shared.plain_paths import plain_path
from shared.text import format_size


@dataclass(frozen=True)
class Accelerator:
    """The device and its memory."""

    device: str
    backend: Literal["metal", "cuda", "cpu"]
    mlx_version: str
    memory_bytes: int
    # The folder in which libraries for this device may be built.
    cache: Path
    # How many threads the caller should compute in; 1 if that is not a CPU.
    threads: int = 1


@dataclass(frozen=True)
class Memory:
    """The memory of this process: MLX's arrays, its cache, the peak of the arrays, and all resident memory."""

    active_bytes: int
    cache_bytes: int
    peak_bytes: int
    resident_bytes: int


# What `prepare` found.
_prepared: Accelerator | None = None


def prepared() -> Accelerator:
    """Returns the accelerator of this process, which `prepare` found."""
    assert _prepared is not None, "prepare() must run before."
    return _prepared


@functools.cache
def prepare(cache: Path) -> Accelerator:
    """Creates a private folder for compiled kernels below `cache`, and sets MLX's cache limit.

    Call it once in each process, before anything imports MLX.
    """
    assert "mlx.core" not in sys.modules, "prepare() must run before MLX is imported."
    if sys.platform == "linux":
        cache.mkdir(parents=True, exist_ok=True)
        _make_kernel_cache(plain_path(cache))
    import mlx.core as mx

    info = mx.device_info()
    threads = 1
    if mx.metal.is_available():
        backend: Literal["metal", "cuda", "cpu"] = "metal"
        memory_bytes = int(info["memory_size"])
    elif mx.cuda.is_available():
        backend = "cuda"
        memory_bytes = int(info["total_memory"])
    else:
        backend = "cpu"
        memory_bytes = memory_limit_bytes()
        mx.set_cache_limit(array_cache_bytes(memory_bytes))
        threads = cpu_threads()
    global _prepared
    _prepared = Accelerator(str(info["device_name"]), backend, version("mlx"), memory_bytes, cache, threads)
    return _prepared


def memory() -> Memory:
    """Returns the memory that this process uses now."""
    import mlx.core as mx

    return Memory(mx.get_active_memory(), mx.get_cache_memory(), mx.get_peak_memory(), _resident_bytes())


def release_memory() -> None:
    """Returns freed memory to the system, for example after the last use of a model."""
    import mlx.core as mx

    gc.collect()
    mx.clear_cache()


def report(accelerator: Accelerator) -> str:
    """Returns several lines about the device: of a CPU its threads and the compiler, of a GPU the measured speed of a
    product."""
    lines = [
        ("device", accelerator.device),
        ("backend", f"{accelerator.backend} (MLX {accelerator.mlx_version})"),
        ("memory", format_size(accelerator.memory_bytes)),
    ]
    if accelerator.backend == "cpu":
        lines.append(("threads", f"{accelerator.threads} for training (OMP_NUM_THREADS)"))
        lines.append(("compiler", find_compiler() or f"none. {NO_COMPILER}"))
    else:
        lines.append(("fp32 product", f"{_measure_gflops():.0f} GFLOP/s"))
    return "\n".join(f"{name:<14}{value}" for name, value in lines)


def _make_kernel_cache(cache: Path) -> None:
    # MLX writes compiled kernels to $TMPDIR/mlx in place and without a lock. So each process locks a folder of its own
    # until it ends, and first removes incomplete files that a killed compiler left there.
    # Calling gettempdir() first keeps Python's own temporary files where they were.
    tempfile.gettempdir()
    for number in count():
        folder = cache / f"kernels-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        for library in folder.rglob("*.so"):
            if not _is_whole(library):
                library.unlink()
        os.environ["TMPDIR"] = str(folder)
        return


def _is_whole(library: Path) -> bool:
    # An ELF file ends with its section table, whose offset and size are in its header (ELF-64, figure 2-2).
    size = library.stat().st_size
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    (table,) = struct.unpack_from("<Q", header, 0x28)
    entry_size, entries = struct.unpack_from("<HH", header, 0x3A)
    return bool(size >= table + entry_size * entries)


def _resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    else:
        command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
        return int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024


def _measure_gflops() -> float:
    import mlx.core as mx

    size = 1024
    matrix = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(matrix @ matrix)
    best_s = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        mx.eval(matrix @ matrix)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s / 1e9
