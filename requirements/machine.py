"""Checks whether this machine can run gptloop: python requirements/machine.py cpu|cuda|macos.

Runs in the Python that gptloop is to use, before anything is installed.
"""

import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

# The first and the last version of Python that MLX has wheels for.
FIRST, LAST = (3, 11), (3, 14)
GLIBC = (2, 35)
MACOS = 14


def lacks(accelerator: str) -> str:
    """Returns a sentence about the first missing requirement, or an empty string."""
    version = sys.version_info[:2]
    if not FIRST <= version <= LAST:
        return (
            "gptloop needs Python {}.{} to {}.{}, because MLX has wheels for these, but this is Python {}.{}. Install "
            "one of them, or name it with make PYTHON=/path/to/python3.12."
        ).format(*FIRST, *LAST, *version)
    if os.pathsep in str(Path.cwd()):
        return f"Python cannot create a virtual environment in a path with a colon; rename {Path.cwd()}."
    if any(importlib.util.find_spec(name) is None for name in ("ensurepip", "venv")):
        name = "python{}.{}-venv".format(*version)
        return f"This Python cannot create virtual environments. On Debian and Ubuntu: apt-get install {name}."
    architecture = platform.machine()
    if accelerator == "macos":
        release = platform.mac_ver()[0]
        if architecture != "arm64" or int(release.partition(".")[0] or 0) < MACOS:
            system = f"macOS {release}" if release else "another system"
            return f"MLX needs macOS {MACOS} or newer on Apple silicon (arm64), but this is {system} on {architecture}."
        return ""
    if architecture not in ("x86_64", "aarch64", "arm64"):
        return f"MLX has no wheels for {architecture}; it needs x86-64 or arm64."
    name, number = platform.libc_ver()
    if name != "glibc" or tuple(int(part) for part in number.split(".")[:2]) < GLIBC:
        return "MLX needs glibc {}.{} or newer, as in Debian 12 and Ubuntu 22.04, but this machine has {} {}.".format(
            *GLIBC, name or "another C library", number
        )
    if accelerator == "cpu" and shutil.which("g++") is None:
        return "Training and generating need g++, which is not installed. On Debian and Ubuntu: apt-get install g++."
    return ""


if __name__ == "__main__":
    sys.exit(lacks(sys.argv[1]) or 0)
