"""A faster g++ for the kernels that MLX compiles on a Linux CPU.

Every kernel begins with the same large header of MLX, which takes most of the time. A script of the same name stands
before the compiler on PATH and has the header precompiled, once: a kernel takes 0.2 s instead of 0.9.
"""

import importlib
import os
import shlex
import shutil
from importlib.metadata import version
from pathlib import Path

from shared.plain_paths import plain_path

_HEADER = "mlx/backend/cpu/compiled_preamble.h"
# The name of the script's folder begins with this.
_FOLDER = "compiler-mlx-"

# The options of MLX's own command; where they differ from it, g++ leaves the precompiled header aside.
_SCRIPT = """#!/bin/sh
if [ "$1" != --version ] && [ ! -f {precompiled} ]; then
    {compiler} -std=c++17 -O3 -fPIC -I{include} -x c++-header {include}/{header} -o {precompiled}.$$ &&
        mv {precompiled}.$$ {precompiled}
fi 2> /dev/null
exec {compiler} -I{folder} "$@"
"""


def name_mlx_plainly() -> None:
    """Lets MLX be imported by a path that its commands can hold: they quote no character that a shell replaces."""
    # This imports the empty package only.
    package = importlib.import_module("mlx")
    folders = [Path(folder) for folder in package.__path__]
    package.__path__ = [str(plain_path(folder.parent) / folder.name) for folder in folders]


def speed_up_compiler(cache: Path) -> None:
    """Puts the script into `cache`, a plain path, and first on this process's PATH; without g++ does nothing."""
    # A process that started this one may have put its script there: two that call each other would never end.
    path = [place for place in os.environ["PATH"].split(os.pathsep) if not Path(place).name.startswith(_FOLDER)]
    compiler = shutil.which("g++", path=os.pathsep.join(path))
    # Any folder that is called mlx and on the search path is one of the locations.
    locations = importlib.import_module("mlx").__path__
    includes = [folder for location in locations if ((folder := Path(location, "include")) / _HEADER).is_file()]
    if compiler is None or not includes:
        return
    folder = cache / f"{_FOLDER}{version('mlx')}"
    precompiled = folder / f"{_HEADER}.gch"
    precompiled.parent.mkdir(parents=True, exist_ok=True)
    script = folder / "g++"
    replacement = folder / f"g++.{os.getpid()}"
    places = {"compiler": compiler, "include": includes[0], "folder": folder, "precompiled": precompiled}
    quoted = {name: shlex.quote(str(place)) for name, place in places.items()}
    replacement.write_text(_SCRIPT.format(header=_HEADER, **quoted))
    replacement.chmod(0o755)
    replacement.replace(script)
    os.environ["PATH"] = os.pathsep.join([str(folder), *path])
