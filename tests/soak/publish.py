"""Kills a publishing process at random moments, and checks the registry.

`python -m tests.soak.publish --kills 200 --store objects`
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shared.errors import RunOwnershipLost
from shared.registry.disk_store import DiskStore
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.registry import Registry
from shared.registry.retention import Retention, prune
from shared.service.lists import print_rows
from tests.object_storage.kinds import Kind, place_of
from tests.registries import own_registry
from tests.shared.registry.scenarios import RUN, make_manifest

PROJECT = Path(__file__).parents[2]
# Keeps little, so that pruning always has something to remove.
RETENTION = Retention(states=2, best=2, newest=3, runs=0)
# Counted from the first line of the child. Writing a state and a version and pruning take about a third of this.
LONGEST_LIVES_S = {Kind.DISK: 0.3, Kind.OBJECTS: 2.0, Kind.NAMED: 2.0}


@dataclass
class Outcome:
    """The counts of all kills."""

    kills: int = 0
    publishes: int = 0
    removals: int = 0
    leftovers: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)


def publish_for_ever() -> None:
    """Takes over the run, then writes a state, publishes a version and prunes, in turn, until it is killed."""
    registry = own_registry()
    registry.sweep()
    fence = registry.take_over(RUN)
    chance = random.Random(fence.token)
    step = max(registry.states(RUN), default=0)
    print("begun", flush=True)

    def manifest(number: int, files: tuple[FileRecord, ...]) -> VersionManifest:
        return make_manifest(number, files, bits_per_byte=chance.uniform(1, 2))

    while True:
        step += 1
        registry.write_state(fence, step, _write_model)
        registry.publish_version(fence, _write_model, manifest)
        prune(registry, RETENTION)


def _write_model(folder: Path) -> None:
    chance = random.Random()
    (folder / "model.safetensors").write_bytes(chance.randbytes(1 << 20))
    (folder / "tokenizer.json").write_bytes(chance.randbytes(1 << 16))
    (folder / "config.json").write_text("{}", encoding="utf-8")


def kill_often(kills: int, seed: int, longest_life_s: float, progress: Progress) -> Outcome:
    """Kills a child that publishes into the registry of this process this many times, and checks it after each kill."""
    chance, outcome, begin = random.Random(seed), Outcome(), time.monotonic()
    newest = 0
    for _ in progress.track(range(kills), description="kills"):
        before = own_registry().take_over(RUN)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.publish", "--child"], cwd=PROJECT, stdout=subprocess.PIPE
        )
        with child:
            assert child.stdout is not None
            begun = child.stdout.readline()
            time.sleep(chance.uniform(0, longest_life_s))
            child.kill()
        outcome.kills += 1
        if not begun:
            outcome.violations.append(f"kill {outcome.kills}: the process could not start on the files of the last one")
        try:
            newest = _check(before, newest, outcome)
        except Exception as error:
            outcome.violations.append(f"kill {outcome.kills}: {type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - begin
    return outcome


def _check(before: Fence, newest: int, outcome: Outcome) -> int:
    """Checks the registry after a kill; returns the number of the newest version."""
    registry = own_registry()
    for checkpoint in registry.checkpoints():
        registry.check(checkpoint)
    present = [manifest.version for manifest in registry.versions()]
    assert not registry.unreadable and not registry.store.unknown(), "something visible is damaged"
    labels = registry.labels()
    assert set(labels) == ({"best", "latest"} if present else set()) and set(labels.values()) <= set(present)
    assert max(present, default=0) >= newest, f"version {newest} existed, but now the versions are {present}"
    outcome.publishes += max(present, default=0) - newest
    outcome.removals = max(present, default=0) - len(present)
    try:
        registry.write_state(before, 10**9, _write_model)
    except RunOwnershipLost:
        pass
    else:
        raise AssertionError("a process that had lost the run could write it")
    leftovers = len(_staging(registry))
    registry.sweep()
    assert not _staging(registry), "a leftover in staging was not swept"
    outcome.leftovers += leftovers
    return max(present, default=0)


def _staging(registry: Registry) -> list[Path]:
    """Returns what dead processes left; object storage keeps it for a day."""
    if not isinstance(registry.store, DiskStore):
        return []
    staging = registry.store.root / "staging"
    return list(staging.iterdir()) if staging.is_dir() else []


def main(
    kills: Annotated[int, typer.Option(min=1, help="The number of kills.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the moments of the kills.")] = 0,
    store: Annotated[Kind, typer.Option(help="Where the registry is.")] = Kind.DISK,
    child: Annotated[bool, typer.Option("--child", hidden=True)] = False,
) -> None:
    """Print the counts of all kills; exit with code 1 if the registry was damaged after one of them."""
    if child:
        publish_for_ever()
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    folder = Path(tempfile.mkdtemp(prefix="registry-"))
    try:
        with place_of(store, folder), Progress(*columns, console=console, transient=True) as progress:
            outcome = kill_often(kills, seed, LONGEST_LIVES_S[store], progress)
    finally:
        shutil.rmtree(folder)
    counts = (outcome.kills, outcome.publishes, outcome.removals, outcome.leftovers)
    print_rows(
        ("store", "kills", "publishes seen", "versions removed", "leftovers swept", "seconds", "violations"),
        [(store, *map(str, counts), f"{outcome.seconds:.0f}", str(len(outcome.violations)))],
    )
    for violation in outcome.violations:
        print(violation)
    if outcome.violations:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
