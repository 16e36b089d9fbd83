"""Small libraries in C++, compiled once on each machine, or before for every machine that an image runs on."""

import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import FailedPrecondition

# Holds the libraries that were compiled before, as in an image.
PREBUILT = Path(__file__).parent / "prebuilt"

# Functions of vectors, the first file of a library that computes with them.
VECTORS = Path(__file__).with_name("vectors.h")
# How such a library is compiled. Without errno, square roots are instructions. A compiler that may fuse products and
# sums does so in some functions only, and bits would depend on which of them computes.
VECTOR_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-march=native")

_COMPILERS = ("g++", "c++", "clang++")
NO_COMPILER = f"No C++ compiler is installed; install one of {', '.join(_COMPILERS)}."
# An error quotes this many characters from the end of the compiler's output.
_QUOTED_CHARACTERS = 2000


@dataclass(frozen=True)
class Baseline:
    """A kind of processor: the compiler's name for it, the features that it has, as Linux names them, and the options
    by which the compiler uses those that the name does not cover."""

    name: str
    features: frozenset[str]
    more_options: tuple[str, ...] = ()


_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_V4_VNNI = _V4 | {"avx512_vnni"}
_ARMV8_2 = frozenset({"asimd", "atomics", "asimdrdm", "crc32"})
# By architecture, the fastest first. The levels of x86-64 are those of its psABI. VNNI and dotprod are dot products of
# int8, AMX products of small matrices of them.
BASELINES = {
    "x86_64": (
        Baseline("x86-64-v4", _V4_VNNI | {"amx_tile", "amx_int8"}, ("-mavx512vnni", "-mamx-tile", "-mamx-int8")),
        Baseline("x86-64-v4", _V4_VNNI, ("-mavx512vnni",)),
        Baseline("x86-64-v4", _V4),
        Baseline("x86-64-v3", _V3),
        Baseline("x86-64", frozenset()),
    ),
    "aarch64": (
        Baseline("armv8.2-a+dotprod", _ARMV8_2 | {"asimddp"}),
        Baseline("armv8.2-a", _ARMV8_2),
        Baseline("armv8-a", frozenset()),
    ),
}
_NATIVE = "-march=native"


def joined(*files: Path) -> str:
    """Returns the files as one source, whose lines the compiler names by file."""
    return "".join(f'#line 1 "{file.name}"\n{file.read_text()}' for file in files)


def build_library(source: str, options: Sequence[str], cache: Path) -> Path:
    """Returns the shared library of a source.

    It is one that `prebuild_library` built for a processor like this one. Otherwise it is compiled into `cache`, if it
    is not there yet. Raises `FailedPrecondition` if that needs a compiler and there is none, or if the compiler fails.
    """
    processor = _processor()
    features = frozenset(processor.split())
    for baseline in _baselines():
        library = PREBUILT / _file_name(source, _built_for(baseline, options))
        if baseline.features <= features and library.exists():
            return library
    # Machines of different kinds may share the disk of the cache.
    library = cache / _file_name(source, [*options, processor])
    if not library.exists():
        _compile(source, options, library)
    return library


def prebuild_library(source: str, options: Sequence[str], folder: Path) -> None:
    """Compiles a source into `folder` for each baseline of this architecture, which takes the place of `-march=native`.

    Raises `FailedPrecondition` as `build_library` does.
    """
    for baseline in _baselines():
        built_for = _built_for(baseline, options)
        library = folder / _file_name(source, built_for)
        # Without `-march=native` the code is the same for each baseline.
        if not library.exists():
            _compile(source, built_for, library)


def find_compiler() -> str | None:
    """Returns the path of a C++ compiler, if one is installed."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def _baselines() -> Sequence[Baseline]:
    return BASELINES.get(platform.machine(), ())


def _built_for(baseline: Baseline, options: Sequence[str]) -> list[str]:
    march = [f"-march={baseline.name}", *baseline.more_options]
    return [each for option in options for each in (march if option == _NATIVE else [option])]


def _file_name(source: str, options: Sequence[str]) -> str:
    key = hashlib.sha256("\0".join((source, *options)).encode()).hexdigest()[:16]
    return f"native-{key}.so"


def _compile(source: str, options: Sequence[str], library: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        raise FailedPrecondition(NO_COMPILER)
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *options, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(built)]
        try:
            subprocess.run(command, input=source.encode(), check=True, capture_output=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or b"").decode(errors="replace")[-_QUOTED_CHARACTERS:]
            raise FailedPrecondition(f"The compiler failed: {error}\n{said}".rstrip()) from None
        built.replace(library)


def _processor() -> str:
    """Returns a text that differs between processors that cannot run each other's code, with the names of features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
