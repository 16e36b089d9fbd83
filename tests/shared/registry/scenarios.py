"""Short scenarios of the registry, and what a reader must find after one is interrupted."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from shared.registry.fence import Fence
from shared.registry.findings import Finding
from shared.registry.history import EvaluationLine
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.registry import Registry
from shared.registry.retention import Retention, prune
from tests.registries import disk_registry, root_of, run_folder, state_folder, version_folder

RUN = "run-1"
# Keeps little, so that much is removed; runs of the last week are kept, each with its last state.
SPARING = Retention(states=1, best=1, newest=2, runs=0)

# The contents of a registry, each item as a text: two readers that see the same get the same set.
View = frozenset[str]


def make_manifest(version: int, files: tuple[FileRecord, ...] = (), **values: object) -> VersionManifest:
    manifest = VersionManifest(
        version=version,
        run=RUN,
        step=10 * version,
        parent=None,
        created_at=1.0,
        preset="demo",
        model={"layers": 1},
        parameters=1,
        training={},
        tokenizer="bpe",
        tokenizer_digest="d",
        dataset="builtin",
        dataset_revision="1",
        dataset_files=("builtin",),
        validation_files=(),
        evaluation_set="set-a",
        training_loss=2.0,
        validation_loss=2.0,
        bits_per_byte=1.0,
        claimed_loss=2.0,
        files=files,
    )
    return replace(manifest, **values)  # type: ignore[arg-type]


def write_model(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")


def publish(registry: Registry, fence: Fence | None = None, **values: object) -> VersionManifest:
    return registry.publish_version(
        fence or registry.take_over(RUN),
        write_model,
        lambda number, files: make_manifest(number, files, **values),
    )


def write_state(registry: Registry, fence: Fence | None = None, step: int | None = None) -> Path:
    """Writes the state of a step, by default of the one after the last."""
    if step is None:
        step = max(registry.states(RUN), default=0) + 1
    registry.write_state(fence or registry.take_over(RUN), step, write_model)
    return state_folder(registry, RUN, step)


def observe(root: Path) -> View:
    """Returns what a new reader sees; fails if anything visible is damaged, or a label names nothing."""
    registry = disk_registry(root)
    view = set()
    for checkpoint in registry.checkpoints():
        registry.check(checkpoint)
        view.add(f"{checkpoint}: {(Path(registry.place(checkpoint)) / 'manifest.json').read_text()}")
    assert not registry.store.unknown()
    numbers = [manifest.version for manifest in registry.versions()]
    labels = registry.labels()
    assert set(labels) == ({"best", "latest"} if numbers else set())
    assert set(labels.values()) <= set(numbers)
    for run in registry.teachers.runs():
        registry.teachers.verify(run)
        if teachers := [str(each.manifest) for each in registry.teachers.of(run)]:
            view.add(f"teachers of {run}: {teachers}")
    for path in (root / "runs").glob("*/fence"):
        view.add(f"fence of {path.parent.name}: {int(path.read_text())}")
    for run in registry.histories.ages_s():
        view |= {f"line of {run}: {line}" for line in registry.histories.read(run).evaluations}
    findings = registry.decisions.findings()
    view |= {f"finding of {number}: {each}" for number, each in findings.items()}
    assert sum(map(len, findings.values())) == len([*(root / "serving" / "findings").glob("*.json")])
    return frozenset(view)


def things(view: View, kind: str) -> View:
    """Returns the items of a view that are a `version`, a `state`, `teachers`, a `fence`, a `finding` or a `line`."""
    return frozenset(word for word in view if word.startswith(kind))


@dataclass(frozen=True)
class Scenario:
    """An action of the registry.

    prepare: creates what `act` needs, and returns the fence of the run.
    act: the action, which is interrupted.
    may_change: whether an interrupted `act` may turn the first view into the second.
    """

    prepare: Callable[[Registry], Fence]
    act: Callable[[Registry, Fence], object]
    may_change: Callable[[View, View], bool]


def _adds_one(kind: str) -> Callable[[View, View], bool]:
    def may_change(old: View, new: View) -> bool:
        return old <= new and len(new - old) <= 1 and new - old == things(new - old, kind)

    return may_change


def _raises_one(old: View, new: View) -> bool:
    added, lost = new - old, old - new
    return added == things(added, "fence") and lost == things(lost, "fence") and len(added) <= 1 and len(lost) <= 1


def _replaces_one(old: View, new: View) -> bool:
    added, lost = new - old, old - new
    return len(added) == len(lost) <= 1 and added | lost == things(added | lost, "finding")


def _only_removes(old: View, new: View) -> bool:
    # The two newest versions, the last state and the fence are kept.
    return new <= old and len(things(new, "version")) >= 2 and bool(things(new, "state")) and bool(things(new, "fence"))


def _prepare(registry: Registry) -> Fence:
    fence = registry.take_over(RUN)
    prune(registry, SPARING)
    while len(registry.versions()) < 2:
        publish(registry, fence)
        write_state(registry, fence)
    return fence


def _prepare_prune(registry: Registry) -> Fence:
    fence = _prepare(registry)
    publish(registry, fence)
    write_state(registry, fence)
    return fence


def _find_out(registry: Registry, at: float) -> None:
    registry.decisions.keep(1, Finding("digest", "cpu", loss=2.0, refusal=None, sentence="", at=at))


def _prepare_finding(registry: Registry) -> Fence:
    fence = _prepare(registry)
    _find_out(registry, 0)
    return fence


_HISTORIES = ((1, 2, 3), (1, 2, 4), (1, 2), (1,), ())


def make_line(step: int, version: int | None = None) -> EvaluationLine:
    return EvaluationLine(step, 100 * step, 2.0, 1.0, version, time=1.0, attempt=1)


def _prepare_history(registry: Registry) -> Fence:
    fence = _prepare(registry)
    registry.histories.writer(fence, 0).append(*map(make_line, (1, 2, 3)), synced=True)
    return fence


def _continue_history(registry: Registry, fence: Fence) -> None:
    # As a run that has a state of step 2.
    registry.histories.writer(fence, 2, make_line(2)).append(make_line(4), synced=True)


def _replaces_the_last_line(old: View, new: View) -> bool:
    # A power failure may cost any of the last lines, and no line that follows a lost one remains.
    possible = [frozenset(f"line of {RUN}: {make_line(step)}" for step in steps) for steps in _HISTORIES]
    return old - things(old, "line") == new - things(new, "line") and things(new, "line") in possible


# The versions that are to teach; `act` must not read anything that the registry itself does not read.
_TEACHERS: list[int] = []


def _prepare_teachers(registry: Registry) -> Fence:
    fence = _prepare(registry)
    registry.teachers.remove(RUN)
    _TEACHERS[:] = [version.version for version in registry.versions()[:2]]
    return fence


def _take_teachers(registry: Registry, fence: Fence) -> None:
    take_teachers(registry, fence, *_TEACHERS)


def take_teachers(registry: Registry, fence: Fence, *numbers: int) -> None:
    """Makes versions the teachers of the run, as its first attempt does."""
    for number in numbers:
        registry.teachers.take(fence, version_folder(registry, number))
    registry.teachers.keep(fence, numbers)


def _prepare_taught(registry: Registry) -> Fence:
    fence = _prepare_teachers(registry)
    _take_teachers(registry, fence)
    return fence


def _removes_teachers(old: View, new: View) -> bool:
    return new <= old and old - new == things(old - new, "teachers")


def _prepare_nothing(registry: Registry) -> Fence:
    return Fence(RUN, 0)


def _prepare_parent(registry: Registry) -> Fence:
    root_of(registry).parent.mkdir()
    return Fence(RUN, 0)


def _begin(registry: Registry, _: Fence) -> None:
    fence = registry.take_over(RUN)
    publish(registry, fence)
    write_state(registry, fence)
    _find_out(registry, 0)


def _begin_again(registry: Registry, fence: Fence) -> None:
    root = root_of(registry)
    for folder in (root / "versions", run_folder(registry, RUN) / "states", root / "serving" / "findings"):
        folder.mkdir(parents=True)
    _begin(registry, fence)


def _sweep_a_removal(registry: Registry, _: Fence) -> None:
    version_folder(registry, registry.versions()[0].version).rename(root_of(registry) / "staging" / "removed")
    registry.sweep()


def _fills_an_empty_registry(old: View, new: View) -> bool:
    # At most a fence, a version, a state and a finding.
    return not old and len(new) <= 4


# Actions on a registry with contents.
SCENARIOS = {
    "version": Scenario(_prepare, publish, _adds_one("version")),
    # The step follows from the fence, because `act` must not read anything that the registry itself does not read.
    "state": Scenario(_prepare, lambda r, fence: write_state(r, fence, 1000 * fence.token), _adds_one("state")),
    "fence": Scenario(_prepare, lambda registry, _: registry.take_over(RUN), _raises_one),
    "finding": Scenario(_prepare_finding, lambda registry, fence: _find_out(registry, fence.token), _replaces_one),
    "prune": Scenario(_prepare_prune, lambda registry, _: prune(registry, SPARING), _only_removes),
    "teachers": Scenario(_prepare_teachers, _take_teachers, _adds_one("teachers")),
    "teachers-go": Scenario(_prepare_taught, lambda registry, _: registry.teachers.remove(RUN), _removes_teachers),
    "history": Scenario(_prepare_history, _continue_history, _replaces_the_last_line),
}

# Actions on an empty registry, and after a process that was killed before its syncs.
BEGINNINGS = {
    "first": Scenario(_prepare_nothing, _begin, _fills_an_empty_registry),
    "first-after-a-kill": Scenario(_prepare_parent, _begin_again, _fills_an_empty_registry),
    "sweep-after-a-kill": Scenario(_prepare_prune, _sweep_a_removal, _only_removes),
}
