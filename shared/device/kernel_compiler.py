"""A faster g++ for the kernels that MLX compiles on a Linux CPU.

Every kernel begins with the same large header of MLX, which takes most of the compile time. A script named g++ comes
before the compiler on PATH and precompiles the header once. A kernel then takes 0.2 s instead of 0.9 s.
"""

import importlib
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

from shared.atomic_file import replacing
from shared.plain_paths import plain_path

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


def name_mlx_plainly() -> None:
    """Imports MLX from a plain path, because it puts its path into shell commands without escaping it."""
    # Imports only the empty package.
    package = importlib.import_module("mlx")
    folders = [Path(folder) for folder in package.__path__]
    package.__path__ = [str(plain_path(folder.parent) / folder.name) for folder in folders]


def speed_up_compiler(cache: Path) -> None:
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
