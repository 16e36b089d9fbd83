"""The candidates of a sweep: every combination of the values that are tried."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from shared.errors import InvalidArgument, shown
from shared.registry.registry import Registry
from shared.text import excerpt
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import TrainSpec, check_name

_MOST_CANDIDATES = 100
# Candidates share what their losses are compared on, and the steps at which they are.
_TEXT = ("tokenizer", "vocabulary_size", "context_length", "validation_share", "evaluation_windows")
_SHARED = dict.fromkeys((*_TEXT, "max_validation_tokens"), "losses on different held-out text do not compare")
_SHARED |= dict.fromkeys(("max_steps", "evaluation_interval"), "candidates are compared at the same steps")


@dataclass(frozen=True)
class Member:
    """A candidate as its run: its number from 1, the values that are tried, as they were typed, and the run."""

    number: int
    values: Mapping[str, str]
    spec: TrainSpec

    @property
    def text(self) -> str:
        """The values in the form of `--set`."""
        return " ".join(f"{name}={value}" for name, value in self.values.items())


def parse_tries(text: str) -> dict[str, tuple[str, ...]]:
    """Reads `--try "learning_rate=1e-3,3e-3 dropout=0,0.1"`; raises `InvalidArgument` if the text has another form, or
    names a value that the candidates of a sweep share."""
    tries: dict[str, tuple[str, ...]] = {}
    for item in text.split():
        name, _, listed = item.partition("=")
        values = tuple(listed.split(","))
        if not name or not all(values):
            raise InvalidArgument(
                f"{shown(item)} is not of the form name=value,value, as in --try "
                '"learning_rate=1e-3,3e-3 dropout=0,0.1".'
            )
        if name in tries:
            raise InvalidArgument(f"{shown(name)} is tried twice; list all of its values together, as in {name}=1,2.")
        if name in _SHARED:
            raise InvalidArgument(f"{name} cannot be tried, because {_SHARED[name]}; set it for all with --set.")
        tries[name] = values
    return tries


def members(common: TrainRequest, tries: Mapping[str, Sequence[str]], registry: Registry) -> list[Member]:
    """Returns a member for each combination of the values, the last name varying fastest.

    `common` is what they have in common, with the name of the sweep. Raises `InvalidArgument` if there are fewer than
    two combinations or too many, and the errors of `TrainRequest.resolve`; those about values name the candidate.
    """
    if both := tries.keys() & common.overrides.keys():
        raise InvalidArgument(f"{shown(min(both))} stands in --try and in --set; leave it out of one of them.")
    count = math.prod(map(len, tries.values()))
    if not 2 <= count <= _MOST_CANDIDATES:
        raise InvalidArgument(
            f"--try names {count:,} combination{'s' * (count != 1)} of values, but a sweep compares from 2 to "
            f"{_MOST_CANDIDATES}."
        )
    found = list[Member]()
    for number, values in enumerate(itertools.product(*tries.values()), start=1):
        named = dict(zip(tries, values, strict=True))
        found.append(_member(number, named, common, registry))
        for other in found[:-1]:
            if other.spec.config == found[-1].spec.config:
                raise InvalidArgument(
                    f"Candidates {other.number} ({other.text}) and {number} ({found[-1].text}) are the same; name each "
                    "value once."
                )
    return found


def _member(number: int, values: Mapping[str, str], common: TrainRequest, registry: Registry) -> Member:
    run = f"{common.name}-{number}"
    check_name(run)
    own = " ".join(f"{name}={value}" for name, value in values.items())
    try:
        # Without a name: whether a run of this name has begun is for the sweep to judge, which may have begun it.
        spec = replace(common, name="", overrides={**common.overrides, **values}).resolve(registry)
    except InvalidArgument as error:
        raise InvalidArgument(f"Candidate {number} ({excerpt(own, 80)}): {error}") from None
    return Member(number, values, replace(spec, run=run, notes=f"sweep {common.name}: {own}"))
