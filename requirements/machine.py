"""Says what a machine lacks for gptloop, if it lacks anything: python requirements/machine.py cpu|cuda|macos.

It runs in the Python that is to be used, before anything is installed.
"""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

# MLX has wheels from the first to the last.
FIRST, LAST = (3, 11), (3, 14)
GLIBC = (2, 35)
MACOS = 14


def lacks(accelerator: str) -> str:
    """Returns a sentence on the first thing that is missing, else nothing."""
    version = sys.version_info[:2]
    if not FIRST <= version <= LAST:
        return (
            "gptloop needs Python {}.{} to {}.{}, for which MLX has wheels, and this is {}.{}: install one, or name it "
            "with make PYTHON=/path/to/python3.12."
        ).format(*FIRST, *LAST, *version)
    if os.pathsep in str(Path.cwd()):
        return f"Python makes no virtual environment below a name with a colon: rename {Path.cwd()}."
    if any(importlib.util.find_spec(name) is None for name in ("ensurepip", "venv")):
        name = "python{}.{}-venv".format(*version)
        return f"This Python cannot make virtual environments. On Debian and Ubuntu: apt-get install {name}."
    if accelerator == "macos":
        major = int(platform.mac_ver()[0].partition(".")[0] or 0)
        if platform.machine() != "arm64" or major < MACOS:
            return f"MLX runs on macOS {MACOS} or newer on Apple silicon (arm64), and this is not."
        return ""
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        return f"MLX has no wheels for {platform.machine()}: it needs x86-64 or arm64."
    name, number = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in number.split(".")[:2]) < GLIBC:
        return "MLX needs glibc {}.{} or newer, as Debian 12 and Ubuntu 22.04 have it, and this is {} {}.".format(
            *GLIBC, name or "another C library", number
        )
    if accelerator == "cpu" and shutil.which("g++") is None:
        return "There is no g++, with which MLX compiles its kernels. On Debian and Ubuntu: apt-get install g++."
    return ""


if __name__ == "__main__":
    sys.exit(lacks(sys.argv[1]) or 0)
