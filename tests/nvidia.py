"""A machine with NVIDIA's GPUs, as far as a process can see them without computing: `nvidia-smi` and MLX's package.

Only these two are fake, because the tests have no GPU.
"""

import os
from collections.abc import Sequence
from pathlib import Path


def nvidia_machine(folder: Path, mebibytes: Sequence[int]) -> dict[str, str]:
    """Returns the variables with which a process sees GPUs with these sizes of memory."""
    programs, packages = folder / "programs", folder / "packages"
    programs.mkdir(parents=True)
    rows = [f"{at}, GPU-{at}{at}{at}{at}-abcd, {size}" for at, size in enumerate(mebibytes)]
    script = programs / "nvidia-smi"
    script.write_text("\n".join(["#!/bin/sh", *(f"echo '{row}'" for row in rows), ""]))
    script.chmod(0o755)
    package = packages / "mlx_cuda_13-0.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mlx-cuda-13\nVersion: 0.0\n")
    search = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH", "")]))
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": search}
