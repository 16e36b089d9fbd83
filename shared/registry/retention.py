"""Which checkpoints are kept, so that training does not fill the disk."""

import time
from dataclasses import dataclass, fields

from shared.errors import CorruptCheckpoint, InvalidArgument, NotFound
from shared.registry import policy
from shared.registry.commit import writing
from shared.registry.manifest import VersionManifest
from shared.registry.store import Checkpoint, Registry
from shared.settings import Environment, read_int

# A run may still train, or wait to go on, if it wrote a state within this time.
_ACTIVE_S = 7 * 24 * 3600.0

_MOST = 1_000_000


@dataclass(frozen=True)
class Retention:
    """How much is kept. Raises `InvalidArgument` and names the field that is out of range.

    states: the last states of each run that is kept, at least 1.
    best: the best versions of each evaluation set that is kept.
    newest: the newest versions.
    every: each version whose number is a multiple of it; 0 for none.
    runs: the runs that are kept, those that wrote a state last; and every run that wrote one within a week.

    The evaluation sets that are kept are that of the newest version and those on which the kept runs were judged. So a
    model of another text stays until as many later runs have trained. What a label names always stays, with its state.
    """

    states: int = 2
    best: int = 5
    newest: int = 10
    every: int = 0
    runs: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value, minimum = getattr(self, field.name), 1 if field.name == "states" else 0
            if not minimum <= value <= _MOST:
                raise InvalidArgument(f"{field.name} is {value}, but must be from {minimum} to {_MOST}.")


def read_retention(environment: Environment) -> Retention:
    """From `GPTLOOP_KEEP_STATES`, `GPTLOOP_KEEP_BEST`, `GPTLOOP_KEEP_NEWEST`, `GPTLOOP_KEEP_EVERY` and
    `GPTLOOP_KEEP_RUNS`; raises `InvalidArgument` and names the variable that is wrong."""
    default = Retention()

    def read(name: str, value: int, minimum: int = 0) -> int:
        return read_int(environment, name, value, minimum=minimum, maximum=_MOST)

    return Retention(
        states=read("GPTLOOP_KEEP_STATES", default.states, 1),
        best=read("GPTLOOP_KEEP_BEST", default.best),
        newest=read("GPTLOOP_KEEP_NEWEST", default.newest),
        every=read("GPTLOOP_KEEP_EVERY", default.every),
        runs=read("GPTLOOP_KEEP_RUNS", default.runs),
    )


@dataclass(frozen=True)
class Verdict:
    """Why a checkpoint stays; without a reason it goes."""

    checkpoint: Checkpoint
    reasons: tuple[str, ...]


def judge(registry: Registry, retention: Retention) -> list[Verdict]:
    """What a retention says of every version and state, but for versions with a damaged manifest: they need a person.

    Raises `CorruptCheckpoint` where the disk does not yield a manifest, or what was decided about labels.
    """
    versions = _versions(registry)
    decided = registry.decided(versions)
    labels = policy.labels(versions, decided)
    deserving = [each for each in versions if each.version not in decided.refused]
    runs = _kept_runs(registry, retention)
    verdicts = _judge_versions(versions, deserving, labels, runs, retention)
    labelled = {(each.run, each.step): each.version for each in versions if each.version in labels.values()}
    for run in registry.runs():
        steps = registry.states(run)
        last = steps[-retention.states :] if run in runs else []
        for step in steps:
            reasons = [f"last {retention.states} of its run"] if step in last else []
            if (run, step) in labelled:
                reasons.append(f"state of version {labelled[run, step]}")
            verdicts.append(Verdict(Checkpoint(step, run), tuple(reasons)))
    return verdicts


def prune(registry: Registry, retention: Retention) -> list[Checkpoint]:
    """Removes what nothing keeps, each whole, and returns it; raises `FailedPrecondition` where that fails."""
    with writing(registry.root):
        going = [each.checkpoint for each in judge(registry, retention) if not each.reasons]
        return [checkpoint for checkpoint in going if _remove(registry, checkpoint)]


def _remove(registry: Registry, checkpoint: Checkpoint) -> bool:
    """Removes a checkpoint, unless somebody has decided for it since it was judged."""
    with registry.decisions.held():
        versions = registry.versions()
        labelled = set(policy.labels(versions, registry.decided(versions)).values())
        kept = [each for each in versions if each.version in labelled]
        if any(checkpoint in (Checkpoint(each.version), Checkpoint(each.step, each.run)) for each in kept):
            return False
        registry.remove(checkpoint)
        return True


def _versions(registry: Registry) -> list[VersionManifest]:
    versions = []
    for checkpoint in registry.checkpoints():
        try:
            if checkpoint.run is None:
                versions.append(registry.version(checkpoint.number))
        except NotFound:
            continue
        except CorruptCheckpoint as error:
            # What cannot be read now may be the best: without it, others and their states would be judged wrongly.
            if isinstance(error.__cause__, OSError):
                raise
    return versions


def _kept_runs(registry: Registry, retention: Retention) -> set[str]:
    last_written_at = {}
    for run in registry.runs():
        if steps := registry.states(run):
            last_written_at[run] = max(registry.written_at(Checkpoint(step, run)) for step in steps)
    newest = sorted(last_written_at, key=last_written_at.__getitem__, reverse=True)[: retention.runs]
    return {*newest, *(run for run, at in last_written_at.items() if time.time() - at < _ACTIVE_S)}


def _judge_versions(
    versions: list[VersionManifest],
    deserving: list[VersionManifest],
    labels: dict[str, int],
    runs: set[str],
    retention: Retention,
) -> list[Verdict]:
    newest = {each.version for each in versions[max(0, len(versions) - retention.newest) :]}
    lead = policy.leading(deserving)
    sets = {each.evaluation_set for each in versions if each.run in runs or each is versions[-1]}
    best: set[int] = set()
    for evaluation_set in sets:
        judged_alike = [each for each in deserving if each.evaluation_set == evaluation_set]
        best |= {each.version for each in policy.ranking(judged_alike)[: retention.best]}
    verdicts = []
    for number in (each.version for each in versions):
        reasons = [f"label {label}" for label in policy.labels_of(number, labels)]
        if lead is not None and number == lead.since.version != deserving[0].version:
            # Without it the text before could lead again.
            reasons.append("with it its text took best over")
        if number in newest:
            reasons.append(f"newest {retention.newest}")
        if number in best:
            reasons.append(f"best {retention.best} of its evaluation set")
        if retention.every and number % retention.every == 0:
            reasons.append(f"multiple of {retention.every}")
        verdicts.append(Verdict(Checkpoint(number), tuple(reasons)))
    return verdicts
