import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.registries import disk_registry, version_folder
from tests.shared.registry.disk import Disk, Image, Survival, write_image
from tests.shared.registry.faults import Operation, build, linux_only, read_log
from tests.shared.registry.scenarios import BEGINNINGS, RUN, SCENARIOS, observe, publish

PROJECT = Path(__file__).parents[3]
REGISTRY = Path("var") / "registry"

SURVIVALS = [
    Survival(names=False, contents=False),
    Survival(names=True, contents=True),
    Survival(names=True, contents=False),
    Survival(names=False, contents=True),
    *(Survival(names=None, contents=None, seed=seed) for seed in range(6)),
    *(Survival(names=True, contents=None, seed=seed) for seed in range(2)),
]

pytestmark = [pytest.mark.slow, linux_only]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


def images(before: Path, operations: list[Operation]) -> Iterator[tuple[int, Survival, Image]]:
    """Yields possible disks after a power failure before each operation, and after the last one."""
    disk = Disk(before)
    for cut in range(len(operations) + 1):
        for survival in SURVIVALS:
            yield cut, replace(survival, seed=survival.seed + 1000 * cut), disk.image(survival)
        if cut < len(operations):
            disk.apply(operations[cut])


@pytest.mark.parametrize("scenario", SCENARIOS | BEGINNINGS)
def test_after_a_power_failure_a_reader_sees_the_old_registry_or_the_new(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    scene = (SCENARIOS | BEGINNINGS)[scenario]
    world, log, before = tmp_path / "world", tmp_path / "log", tmp_path / "before"
    world.mkdir()
    command = [sys.executable, "-m", "tests.shared.registry.faulted", "record", str(library), str(world), scenario]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    subprocess.run([*command, str(log), str(before)], check=True, cwd=PROJECT, env=environment)
    operations = [
        replace(each, path=each.path.relative_to(world), target=Path(os.path.relpath(each.target, world)))
        for each in read_log(log)
    ]
    assert any(each.name == "sync" for each in operations)
    old, new = observe(before / REGISTRY), observe(world / REGISTRY)
    assert old != new

    # Writes of the test itself need no sync.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    seen: set[object] = set()
    for cut, survival, image in images(before, operations):
        ended = cut == len(operations)
        if (key := (ended, frozenset(image.items()))) in seen:
            continue
        seen.add(key)
        place = f"{survival} before operation {cut}: {None if ended else operations[cut].name}"
        root = tmp_path / "image" / REGISTRY
        write_image(image, tmp_path / "image")
        view = observe(root)
        assert view == new if ended else scene.may_change(old, view), place
        registry = disk_registry(root)
        registry.sweep()
        assert not (root / "staging").exists() or not any((root / "staging").iterdir()), place
        # The number of a visible version is never given again, even if the version is removed.
        newest = max((each.version for each in registry.versions()), default=0)
        shutil.rmtree(version_folder(registry, newest), ignore_errors=True)
        assert publish(registry, registry.take_over(RUN)).version > newest, place
        shutil.rmtree(tmp_path / "image")
    assert len(seen) > 3
