"""The implementations whose generation can be compared, and the packages that they need."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from shared.errors import FailedPrecondition, InvalidArgument

SAMPLED, ARGMAX = "temperature 0.8", "argmax"


@dataclass(frozen=True)
class Implementation:
    """An implementation: a module of `peers`, and a variant after a space. Only benchmarks install `packages`."""

    name: str
    draws: str
    packages: tuple[str, ...] = ()


IMPLEMENTATIONS = (
    Implementation("gptloop-engine", SAMPLED),
    Implementation("gptloop-engine greedy", ARGMAX),
    Implementation("gptloop-engine fp32", SAMPLED),
    Implementation("gptloop-grpc", SAMPLED),
    Implementation("gptloop-http", SAMPLED),
    Implementation("mlx-lm-batch", ARGMAX, ("mlx_lm",)),
    Implementation("pytorch", ARGMAX, ("torch",)),
    Implementation("pytorch graph", SAMPLED, ("torch",)),
    Implementation("ctranslate2", ARGMAX, ("ctranslate2", "torch", "transformers")),
    Implementation("ctranslate2 int8", ARGMAX, ("ctranslate2", "torch", "transformers")),
)


def find_implementations(names: Sequence[str], among: Sequence[str]) -> tuple[Implementation, ...]:
    """Returns the implementations of these names; `among` are the modules that a benchmark can measure.

    Raises `InvalidArgument` for another name, and `FailedPrecondition` if a package is not installed.
    """
    known = {each.name: each for each in IMPLEMENTATIONS if each.name.partition(" ")[0] in among}
    if unknown := [name for name in names if name not in known]:
        raise InvalidArgument(f"Unknown peer {unknown[0]!r}. Use {', '.join(known)}.")
    found = tuple(known[name] for name in dict.fromkeys(names))
    require_installed(package for each in found for package in each.packages)
    return found


def require_installed(packages: Iterable[str]) -> None:
    """Raises `FailedPrecondition` if a package is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise FailedPrecondition(f"The package {package} is not installed; `make bench-serve` installs it.")
