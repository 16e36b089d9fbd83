"""The status of versions in listings, and why none of them serves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from inference_service.versions.entry import Entry
from inference_service.versions.planner import State
from shared.decoding.weight_format import WeightFormat
from shared.errors import shown
from shared.registry.evaluations import Figures
from shared.registry.findings import Finding
from shared.registry.manifest import VersionManifest
from shared.registry.policy import labels_of
from shared.text import shorten

# The most characters of a reason that a sentence shows.
_REASON_CHARACTERS = 160


@dataclass(frozen=True)
class VersionStatus:
    """The status of a version. `reason` says why it is refused or could not be loaded, and is empty otherwise.

    `manifest` is None if it cannot be read. `weights` is the format in which a version in memory computes. `loss` is
    that of its held-out windows in nats a token, as it was served, `evaluation` the figures of its evaluation.
    """

    number: int
    manifest: VersionManifest | None
    state: State
    reason: str = ""
    streams: int = 0
    held: bool = False
    memory_bytes: int = 0
    weights: WeightFormat | None = None
    loss: float | None = None
    labels: tuple[str, ...] = ()
    evaluation: Figures | None = None


def status_of(
    entry: Entry,
    waits: bool,
    finding: Finding | None,
    lacking: str,
    labels: Mapping[str, int],
    evaluation: Figures | None,
    now: float,
) -> VersionStatus:
    """Returns the status of a version: what this server does with it, unless it waits for room, or the registry says
    that it is refused, or that it lacks files, `lacking` being a sentence about them."""
    manifest, resident, state = entry.manifest, entry.resident, entry.state
    refusal = "" if finding is None or finding.refusal is None else f"{finding.refusal}: {finding.sentence}"
    if refusal and state not in (State.SERVING, State.LOADING):
        state = State.REFUSED
    elif (waits or lacking) and state is State.AVAILABLE:
        state = State.WAITING
    return VersionStatus(
        manifest.version,
        manifest,
        state,
        refusal or lacking or (entry.retry_sentence if now < entry.retry_at else ""),
        streams=entry.streams,
        held=entry.held,
        memory_bytes=0 if resident is None else resident.memory_bytes,
        weights=None if resident is None else resident.weights,
        loss=resident.loss if resident is not None else finding.loss if finding is not None else None,
        labels=labels_of(manifest.version, labels),
        evaluation=evaluation,
    )


def why_none_serves(statuses: Sequence[VersionStatus], policy: str) -> str:
    """Returns a sentence or two on why no version serves; `policy` is the label whose version should."""
    if not statuses:
        return (
            "No version serves yet: there is none in the registry, and the first one comes with the first evaluation "
            f"of a training job.{_policy_note(statuses, policy)}"
        )
    loading = [status for status in statuses if status.state is State.LOADING]
    if loading:
        return f"No version serves yet: version {loading[-1].number} is being examined."
    waiting = [status for status in statuses if status.state is not State.REFUSED]
    if waiting:
        why = shorten(waiting[-1].reason, _REASON_CHARACTERS) or f"version {waiting[-1].number} waits to be examined."
        return f"No version serves yet: {why[0].lower()}{why[1:]}"
    *_, last = statuses
    reason = shorten(last.reason, _REASON_CHARACTERS).removesuffix(".")
    if len(statuses) == 1:
        why = f"version {last.number} was refused, as {reason}"
    else:
        why = f"versions {statuses[0].number} to {last.number} were refused, the last one as {reason}"
    return f"No version can serve: {why}.{_policy_note(statuses, policy)}"


def _policy_note(statuses: Sequence[VersionStatus], policy: str) -> str:
    """A sentence if the policy names a version or a run that does not exist."""
    if ":" not in policy or any(policy in status.labels for status in statuses):
        return ""
    return f" The policy is {shown(policy)}, which names no version."
