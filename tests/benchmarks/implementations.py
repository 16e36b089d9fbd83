"""What can be measured side by side in generating text, and what each needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from shared.errors import FailedPrecondition, InvalidArgument

SAMPLED, ARGMAX = "temperature 0.8", "argmax"


@dataclass(frozen=True)
class Implementation:
    """One of them: a module of `peers`, and its variant after a space. `packages` are installed for benchmarks only."""

    name: str
    draws: str
    packages: tuple[str, ...] = ()


IMPLEMENTATIONS = (
    Implementation("gptloop-engine", SAMPLED),
    Implementation("gptloop-engine greedy", ARGMAX),
    Implementation("gptloop-grpc", SAMPLED),
    Implementation("mlx-lm-batch", ARGMAX, ("mlx_lm",)),
    Implementation("ctranslate2", ARGMAX, ("ctranslate2", "torch", "transformers")),
)


def find_implementations(names: Sequence[str], among: Sequence[str]) -> tuple[Implementation, ...]:
    """The implementations of these names, whose modules are `among` those that can do what is measured.

    Raises `InvalidArgument` on another name, and `FailedPrecondition` as `require_installed` does.
    """
    known = {each.name: each for each in IMPLEMENTATIONS if each.name.partition(" ")[0] in among}
    if unknown := [name for name in names if name not in known]:
        raise InvalidArgument(f"There is no {unknown[0]!r} to measure here; there are {', '.join(known)}.")
    found = tuple(known[name] for name in dict.fromkeys(names))
    require_installed(package for each in found for package in each.packages)
    return found


def require_installed(packages: Iterable[str]) -> None:
    """Raises `FailedPrecondition` where one is not."""
    for package in packages:
        if find_spec(package) is None:
            raise FailedPrecondition(f"The package {package} is not installed; `make bench-serve` installs it.")
