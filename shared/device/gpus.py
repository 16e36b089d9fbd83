"""The GPUs of this machine, found without loading a model framework."""

import logging
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions

from shared.device.machine import physical_memory_bytes

logger = logging.getLogger(__name__)

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.total", "--format=csv,noheader,nounits")
_LIMIT_S = 30.0


def gpu_memories_bytes() -> tuple[int, ...]:
    """Returns the memory of each GPU on which MLX computes here; nothing if it computes on the CPU.

    These are Apple's GPU, which shares the memory of the machine, or those of NVIDIA that `CUDA_VISIBLE_DEVICES` shows,
    if MLX is installed for CUDA.
    """
    if sys.platform == "darwin":
        return (physical_memory_bytes(),) if platform.machine() == "arm64" else ()
    if not any((each.name or "").startswith("mlx-cuda") for each in distributions()):
        return ()
    try:
        listed = subprocess.run(_QUERY, capture_output=True, text=True, check=True, timeout=_LIMIT_S).stdout
        rows = [line.split(", ") for line in listed.splitlines()]
        gpus = [(index, uuid, int(mebibytes) << 20) for index, uuid, mebibytes in rows]
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        logger.warning("MLX is installed for CUDA, but nvidia-smi lists no GPU: %s", error)
        return ()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return tuple(size_bytes for _, _, size_bytes in gpus)
    memories = list[int]()
    for name in shown.split(","):
        found = [size for index, uuid, size in gpus if name and (name == index or uuid.startswith(name))]
        if len(found) != 1:
            break  # CUDA shows none after a name that it does not know
        memories += found
    return tuple(memories)
