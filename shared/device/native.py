"""Small libraries in C and C++, compiled once on each machine, or before for every machine that an image runs on."""

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
_ARMV8_2 = frozenset({"asimd", "atomics", "asimdrdm", "crc32"})
# By architecture, the fastest first. The levels of x86-64 are those of its psABI. VNNI and dotprod are dot products of
# int8.
BASELINES = {
    "x86_64": (
        Baseline("x86-64-v4", _V4 | {"avx512_vnni"}, ("-mavx512vnni",)),
        Baseline("x86-64-v4", _V4),
        Baseline("x86-64-v3", _V3),
    ),
    "aarch64": (Baseline("armv8.2-a+dotprod", _ARMV8_2 | {"asimddp"}), Baseline("armv8.2-a", _ARMV8_2)),
}
_NATIVE = "-march=native"


def build_library(source: str, language: str, options: Sequence[str], cache: Path) -> Path:
    """Returns the shared library of a source in "c" or "c++".

    It is one that `prebuild_library` built for a processor like this one. Otherwise it is compiled into `cache`, if it
    is not there yet. Raises `FailedPrecondition` if that needs a compiler and there is none, or if the compiler fails.
    """
    processor = _processor()
    features = frozenset(processor.split())
    for baseline in _baselines():
        library = PREBUILT / _file_name(language, source, _built_for(baseline, options))
        if baseline.features <= features and library.exists():
            return library
    # Machines of different kinds may share the disk of the cache.
    library = cache / _file_name(language, source, [*options, processor])
    if not library.exists():
        _compile(source, language, options, library)
    return library


def prebuild_library(source: str, language: str, options: Sequence[str], folder: Path) -> None:
    """Compiles a source into `folder` for each baseline of this architecture, which takes the place of `-march=native`.

    Raises `FailedPrecondition` as `build_library` does.
    """
    for baseline in _baselines():
        built_for = _built_for(baseline, options)
        library = folder / _file_name(language, source, built_for)
        # Code for any processor of the architecture is the same for each baseline.
        if not library.exists():
            _compile(source, language, built_for, library)


def _baselines() -> Sequence[Baseline]:
    return BASELINES.get(platform.machine(), ())


def _built_for(baseline: Baseline, options: Sequence[str]) -> list[str]:
    march = [f"-march={baseline.name}", *baseline.more_options]
    return [each for option in options for each in (march if option == _NATIVE else [option])]


def _file_name(language: str, source: str, options: Sequence[str]) -> str:
    key = hashlib.sha256("\0".join((language, source, *options)).encode()).hexdigest()[:16]
    return f"native-{key}.so"


def _compile(source: str, language: str, options: Sequence[str], library: Path) -> None:
    names = ("gcc", "cc", "clang") if language == "c" else ("g++", "c++", "clang++")
    compiler = next((path for name in names if (path := shutil.which(name))), None)
    if compiler is None:
        raise FailedPrecondition(
            f"No {language} compiler is installed; install one of {', '.join(names)}.{_unsuitable_sentence()}"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [compiler, *options, "-shared", "-fPIC", "-x", language, "-", "-o", str(built)]
        try:
            subprocess.run(command, input=source.encode(), check=True, capture_output=True, timeout=120)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or b"").decode(errors="replace")[-_QUOTED_CHARACTERS:]
            raise FailedPrecondition(f"The compiler failed: {error}\n{said}".rstrip()) from None
        built.replace(library)


def _unsuitable_sentence() -> str:
    """Says which features this processor lacks for the prebuilt libraries, if there are any."""
    if not PREBUILT.is_dir() or not _baselines():
        return ""
    least = _baselines()[-1]
    missing = ", ".join(sorted(least.features.difference(_processor().split())))
    return f" The prebuilt libraries are for {least.name} or newer; this processor lacks {missing}." if missing else ""


def _processor() -> str:
    """Returns a text that differs between processors that cannot run each other's code, with the names of features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
