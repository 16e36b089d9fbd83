"""The memory and the cores of this machine. Importing this loads no model framework."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

# The limits of the memory of this process's control group, version 2 and version 1.
_GROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def physical_memory_bytes() -> int:
    """Returns the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory_limit_bytes(limits: Sequence[Path] = _GROUP_LIMITS) -> int:
    """Returns the memory that this process may use: the limit of its container, else the memory of the machine."""
    for path in limits:
        with suppress(OSError, ValueError):
            return min(int(path.read_text()), physical_memory_bytes())
    return physical_memory_bytes()


def array_cache_bytes(memory_bytes: int) -> int:
    """Returns how much memory of freed arrays MLX keeps on a CPU.

    With MLX's own limit of 32 MiB, every large array takes fresh pages, which the kernel has to clear.
    """
    return memory_bytes // 8


def cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def cpu_threads() -> int:
    """Returns how many threads a process may compute in: OMP_NUM_THREADS, or else the number of cores."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    if limit.isdecimal() and int(limit) > 0:
        return int(limit)
    return cores()
