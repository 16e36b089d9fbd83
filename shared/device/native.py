"""Small libraries in C and C++, compiled once on each machine."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from shared.errors import FailedPrecondition

# An error quotes this many characters from the end of the compiler's output.
_QUOTED_CHARACTERS = 2000


def build_library(source: str, language: str, options: Sequence[str], cache: Path) -> Path:
    """Returns the shared library of a source in "c" or "c++"; compiles it into `cache` if it is not there yet.

    Raises `FailedPrecondition` if there is no compiler, or if it fails.
    """
    names = ("gcc", "cc", "clang") if language == "c" else ("g++", "c++", "clang++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise FailedPrecondition(f"No {language} compiler is installed; install one of {', '.join(names)}.")
    # Machines of different kinds may share the disk of the cache.
    key = hashlib.sha256("\0".join((language, source, *options, _processor())).encode()).hexdigest()[:16]
    library = cache / f"native-{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = Path(folder) / library.name
            command = [compiler, *options, "-shared", "-fPIC", "-x", language, "-", "-o", str(built)]
            try:
                subprocess.run(command, input=source.encode(), check=True, capture_output=True, timeout=120)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                said = (error.stderr or b"").decode(errors="replace")[-_QUOTED_CHARACTERS:]
                raise FailedPrecondition(f"The compiler failed: {error}\n{said}".rstrip()) from None
            built.replace(library)
    return library


def _processor() -> str:
    """Returns a text that differs between processors that cannot run each other's code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{os.uname().machine} {features}"
