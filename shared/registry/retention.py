"""Decides which checkpoints are kept, so that training does not fill the disk."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound, UnreadableCheckpoint
from shared.registry import policy
from shared.registry.commit import writing
from shared.registry.decisions import Decided, run_label
from shared.registry.manifest import VersionManifest
from shared.registry.registry import ENDED, Checkpoint, Registry
from shared.registry.store import Run

# An unfinished run that wrote a state within this time may still train, or wait to continue.
_ACTIVE_S = 7 * 24 * 3600.0

MAX_COUNT = 1_000_000
MAX_BYTES = 2**60


@dataclass(frozen=True)
class Retention:
    """How many checkpoints are kept. Raises `InvalidArgument`, which names the field that is out of range.

    states: how many of the last states of each kept run, at least 1; of a finished run only the last state is kept.
    best: how many of the best versions of each kept evaluation set.
    newest: how many of the newest versions.
    every: keeps each version whose number is a multiple of this; 0 for none.
    runs: how many runs, those that wrote a state last; every run that may still train is kept too.
    size_bytes: the limit on the size of all checkpoints; 0 for no limit.

    The kept evaluation sets are those of the newest version and of the kept runs. So a model of another text is kept
    until this many later runs have trained. A version that a label names or a job waits for is always kept, with its
    state, and so is the last state of each kept run. Of the others, the limit on the size removes older states first,
    then versions that are not among the best, from the oldest on, then the worst of the best.
    """

    states: int = 2
    best: int = 5
    newest: int = 10
    every: int = 0
    runs: int = 10
    size_bytes: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, minimum = getattr(self, field.name), 1 if field.name == "states" else 0
            most = MAX_BYTES if field.name == "size_bytes" else MAX_COUNT
            if not minimum <= value <= most:
                raise InvalidArgument(f"{field.name} is {value}, but must be from {minimum} to {most}.")


@dataclass(frozen=True)
class Verdict:
    """The reasons why a checkpoint is kept; without any, it is removed.

    `is_firm` means that the limit on the size cannot remove it, `has_no_room` that this limit removes it.
    """

    checkpoint: Checkpoint
    reasons: tuple[str, ...]
    is_firm: bool = False
    has_no_room: bool = False


def judge(registry: Registry, retention: Retention) -> list[Verdict]:
    """Judges every version and state, except versions with a damaged manifest, which a person must handle.

    Raises `UnreadableCheckpoint` if a manifest cannot be read, and `CorruptCheckpoint` if a decision about labels is
    damaged.
    """
    versions = _versions(registry)
    decided = registry.decided(versions)
    deserving = [each for each in versions if each.version not in decided.refused]
    needed = _needed(registry, versions, decided)
    firm, lead = dict(needed), policy.leading(deserving)
    if lead is not None and lead.since.version != deserving[0].version:
        # Without it the previous evaluation set could lead again.
        since = lead.since.version
        firm[since] = [*needed.get(since, ()), "its evaluation set leads since this version"]
    found = registry.store.runs()
    runs = _kept_runs(found, retention)
    best = _best(versions, deserving, runs, retention.best)
    verdicts = _judge_versions(versions, firm, best, retention) + _judge_states(
        found, runs, {(each.run, each.step): each.version for each in versions if each.version in needed}
    )
    if not retention.size_bytes:
        return verdicts
    return _within(verdicts, registry, retention.size_bytes, {number: rank for rank, number in enumerate(best)})


def prune(registry: Registry, retention: Retention) -> list[Checkpoint]:
    """Removes every checkpoint that is not kept, and returns them; raises `FailedPrecondition` if that fails.

    The teachers of a run go once the run has no state, its history once it has no version either.
    """
    with writing(registry.store.address):
        going = [each.checkpoint for each in judge(registry, retention) if not each.reasons]
        gone = [checkpoint for checkpoint in going if _remove(registry, checkpoint)]
        _remove_teachers(registry)
        _remove_histories(registry)
        return gone


def _remove(registry: Registry, checkpoint: Checkpoint) -> bool:
    """Removes a checkpoint, unless it became needed since it was judged."""
    try:
        judged = [registry.version(checkpoint.number)] if checkpoint.run is None else []
    except (CorruptCheckpoint, NotFound):
        return False  # removed or damaged since it was judged

    def is_needed() -> bool:
        # The store may hide the checkpoint before it asks.
        found = {each.version: each for each in (*judged, *registry.versions())}
        versions = [found[number] for number in sorted(found)]
        needed = _needed(registry, versions, registry.decided(versions))
        kept = [each for each in versions if each.version in needed]
        return any(checkpoint in (Checkpoint(each.version), Checkpoint(each.step, each.run)) for each in kept)

    return registry.remove(checkpoint, unless=is_needed)


def _remove_teachers(registry: Registry) -> None:
    for run in registry.teachers.runs():
        # A run that has just begun has no state yet.
        if not registry.states(run) and registry.teachers.age_s(run) > _ACTIVE_S:
            registry.teachers.remove(run)


def _remove_histories(registry: Registry) -> None:
    versions = registry.versions()
    if registry.unreadable:
        return  # one of them may be of any run
    remaining = {each.run for each in versions} | {name for name, run in registry.store.runs().items() if run.states}
    for run, age_s in registry.histories.ages_s().items():
        # A run that has just begun has no state yet.
        if run not in remaining and age_s > _ACTIVE_S:
            registry.histories.remove(run)


def _versions(registry: Registry) -> list[VersionManifest]:
    versions = []
    for checkpoint in registry.checkpoints():
        try:
            if checkpoint.run is None:
                versions.append(registry.version(checkpoint.number))
        except UnreadableCheckpoint:
            raise  # it may be the best one; without it, the others would be judged wrongly
        except (NotFound, CorruptCheckpoint):
            continue
    return versions


def _needed(registry: Registry, versions: Sequence[VersionManifest], decided: Decided) -> dict[int, list[str]]:
    """Returns the versions that stay with their states whatever the rules are, each with the reasons."""
    labels, held = policy.labels(versions, decided), registry.holds.jobs()
    for run, job in registry.holds.runs().items():
        if (best := policy.number_of(run_label(run), versions, decided)) is not None:
            held.setdefault(best, job)
    needed = {}
    for version in versions:
        number = version.version
        reasons = [f"label {label}" for label in policy.labels_of(number, labels)]
        if number in held:
            reasons.append(f"job {held[number]} waits for it")
        if registry.lacking(version):
            # They may still be copied here, or become readable again, so only a person removes it.
            reasons.append("some of its files are missing or cannot be read")
        if reasons:
            needed[number] = reasons
    return needed


def _kept_runs(runs: Mapping[str, Run], retention: Retention) -> dict[str, int]:
    """Returns the kept runs, each with the number of its states to keep."""
    ended = {name for name, run in runs.items() if ENDED in run.texts}
    last_written_at = {name: max(run.states.values()) for name, run in runs.items() if run.states}
    newest = sorted(last_written_at, key=last_written_at.__getitem__, reverse=True)[: retention.runs]
    active = (run for run, at in last_written_at.items() if run not in ended and time.time() - at < _ACTIVE_S)
    return {run: 1 if run in ended else retention.states for run in (*newest, *active)}


def _best(
    versions: Sequence[VersionManifest], deserving: Sequence[VersionManifest], runs: Collection[str], count: int
) -> list[int]:
    """Returns the best versions of each kept evaluation set, ordered by their rank within their set."""
    ranked: list[tuple[int, int]] = []
    for evaluation_set in {each.evaluation_set for each in versions if each.run in runs or each is versions[-1]}:
        judged_alike = [each for each in deserving if each.evaluation_set == evaluation_set]
        ranked += [(rank, -each.version) for rank, each in enumerate(policy.ranking(judged_alike)[:count])]
    return [-number for _, number in sorted(ranked)]


def _judge_versions(
    versions: Sequence[VersionManifest],
    firm: Mapping[int, Sequence[str]],
    best: Collection[int],
    retention: Retention,
) -> list[Verdict]:
    newest = {each.version for each in versions[max(0, len(versions) - retention.newest) :]}
    verdicts = []
    for number in (each.version for each in versions):
        reasons = list(firm.get(number, ()))
        if number in newest:
            reasons.append(f"newest {retention.newest}")
        if number in best:
            reasons.append(f"best {retention.best} of its evaluation set")
        if retention.every and number % retention.every == 0:
            reasons.append(f"multiple of {retention.every}")
        verdicts.append(Verdict(Checkpoint(number), tuple(reasons), is_firm=number in firm))
    return verdicts


def _judge_states(
    runs: Mapping[str, Run], kept: Mapping[str, int], continued: Mapping[tuple[str, int], int]
) -> list[Verdict]:
    """`kept` is the number of states to keep of each run, `continued` the version that needs a state."""
    verdicts = []
    for run in sorted(runs):
        steps, count = sorted(runs[run].states), kept.get(run, 0)
        last = steps[len(steps) - min(count, len(steps)) :]
        for step in steps:
            reasons = [f"last {count} of its run"] if step in last else []
            if (run, step) in continued:
                reasons.append(f"state of version {continued[run, step]}")
            is_firm = (run, step) in continued or step in last[-1:]
            verdicts.append(Verdict(Checkpoint(step, run), tuple(reasons), is_firm))
    return verdicts


def _within(verdicts: list[Verdict], registry: Registry, limit_bytes: int, rank: Mapping[int, int]) -> list[Verdict]:
    """Returns the verdicts with more removals, until the kept checkpoints fit into the limit, as far as possible.

    `rank` is the rank of each of the best versions, from 0 on.
    """

    def value(verdict: Verdict) -> tuple[float, ...]:
        checkpoint = verdict.checkpoint
        if checkpoint.run is not None:
            return (0, registry.written_at(checkpoint))
        number = checkpoint.number
        return (2, -rank[number], number) if number in rank else (1, number)

    sizes = {each.checkpoint: registry.size_bytes(each.checkpoint) for each in verdicts if each.reasons}
    over = sum(sizes.values()) - limit_bytes
    going = set()
    for each in sorted((each for each in verdicts if each.reasons and not each.is_firm), key=value):
        if over <= 0:
            break
        over -= sizes[each.checkpoint]
        going.add(each.checkpoint)
    return [Verdict(each.checkpoint, (), has_no_room=True) if each.checkpoint in going else each for each in verdicts]
