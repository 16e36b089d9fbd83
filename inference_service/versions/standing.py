"""How versions stand for a server, and why none of them serves."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from shared.errors import shown
from shared.registry.manifest import VersionManifest
from shared.text import shorten

# The most characters of a reason that a sentence shows.
_REASON_CHARACTERS = 160


class State(Enum):
    """Where a version stands. WAITING is for room in memory, or for files that are still being copied; a RESIDENT one
    is in memory, and answers those who name it."""

    AVAILABLE = auto()
    WAITING = auto()
    LOADING = auto()
    RESIDENT = auto()
    SERVING = auto()
    REFUSED = auto()


@dataclass(frozen=True)
class Standing:
    """All that there is to say of a version: `reason` is why it is refused or could not be loaded, else empty.

    `manifest` is None if it cannot be read. `loss` is that of its carried windows in nats a token, as it was served.
    """

    number: int
    manifest: VersionManifest | None
    state: State
    reason: str = ""
    streams: int = 0
    held: bool = False
    memory_bytes: int = 0
    loss: float | None = None
    labels: tuple[str, ...] = ()


def why_none_serves(standings: Sequence[Standing], policy: str) -> str:
    """A sentence or two on why no version serves; `policy` is the label whose version should."""
    if not standings:
        return (
            "No version serves yet: there is none in the registry, and the first one comes with the first evaluation "
            f"of a training job.{_policy_note(standings, policy)}"
        )
    loading = [standing for standing in standings if standing.state is State.LOADING]
    if loading:
        return f"No version serves yet: version {loading[-1].number} is being examined."
    waiting = [standing for standing in standings if standing.state is not State.REFUSED]
    if waiting:
        why = shorten(waiting[-1].reason, _REASON_CHARACTERS) or f"version {waiting[-1].number} waits to be examined."
        return f"No version serves yet: {why[0].lower()}{why[1:]}"
    *_, last = standings
    reason = shorten(last.reason, _REASON_CHARACTERS).removesuffix(".")
    if len(standings) == 1:
        why = f"version {last.number} was refused, as {reason}"
    else:
        why = f"versions {standings[0].number} to {last.number} were refused, the last one as {reason}"
    return f"No version can serve: {why}.{_policy_note(standings, policy)}"


def _policy_note(standings: Sequence[Standing], policy: str) -> str:
    """A sentence if the policy is for a version or a run that is not there."""
    if ":" not in policy or any(policy in standing.labels for standing in standings):
        return ""
    return f" The policy is {shown(policy)}, which names no version."
