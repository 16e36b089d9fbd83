import os
import time
from pathlib import Path

import pytest

from shared.errors import CorruptCheckpoint, InvalidArgument
from shared.registry.fence import Fence
from shared.registry.retention import Retention, judge, prune, read_retention
from shared.registry.store import Checkpoint, Registry
from tests.shared.registry.scenarios import make_manifest, write_model

DAY_S = 24 * 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def evaluate(
    registry: Registry, run: str, step: int, bits: float = 1.0, text: str = "set-a", days_ago: float = 0
) -> int:
    """What a run does at an evaluation: a state and a version; returns its number."""
    fence = Fence.raise_for(registry.run_directory(run))
    directory = registry.write_state(fence, run, step, write_model)
    written_at = time.time() - days_ago * DAY_S
    os.utime(directory, (written_at, written_at))
    values = {"run": run, "step": step, "bits_per_byte": bits, "evaluation_set": text}
    manifest = registry.publish_version(
        fence, write_model, lambda number, files: make_manifest(number, files, **values)
    )
    return manifest.version


def numbers(registry: Registry) -> list[int]:
    return [manifest.version for manifest in registry.versions()]


def test_the_newest_the_best_and_what_a_label_needs_stay(registry: Registry) -> None:
    for version in range(1, 21):
        evaluate(registry, "run-1", 10 * version, 0.5 if version == 2 else 1.0 + version / 100)
        prune(registry, Retention())
    assert numbers(registry) == [1, 2, 3, 4, 5, *range(11, 21)]
    assert registry.labels() == {"best": 2, "latest": 20}
    assert registry.states("run-1") == [20, 190, 200]


def test_every_value_keeps_what_it_says(registry: Registry) -> None:
    for version in range(1, 13):
        evaluate(registry, "run-1", version, bits=2.0 - version / 100)
    prune(registry, Retention(states=3, best=2, newest=1, every=4))
    assert numbers(registry) == [4, 8, 11, 12]
    assert registry.states("run-1") == [10, 11, 12]
    prune(registry, Retention(states=1, best=0, newest=0))
    assert numbers(registry) == [12] and registry.states("run-1") == [12]


def test_a_model_of_another_text_stays_as_long_as_its_run_does(registry: Registry) -> None:
    retention = Retention(best=1, newest=2, runs=3)
    other = evaluate(registry, "other", 10, text="another text", days_ago=30)
    for run in range(2):
        for step in range(1, 5):
            evaluate(registry, f"run-{run}", step, days_ago=20)
    prune(registry, retention)
    assert numbers(registry)[0] == other and registry.states("other") == [10]
    evaluate(registry, "run-2", 1, days_ago=10)
    prune(registry, retention)
    assert numbers(registry)[0] != other and registry.states("other") == []
    assert registry.states("run-0") == [3, 4]


def test_a_run_that_may_still_train_keeps_its_states_whatever_others_do(registry: Registry) -> None:
    evaluate(registry, "slow", 10, days_ago=6)
    for run in range(3):
        evaluate(registry, f"run-{run}", 1)
    prune(registry, Retention(newest=1, best=1, runs=1))
    assert registry.states("slow") == [10]


def test_the_state_of_a_labelled_version_outlives_its_run(registry: Registry) -> None:
    evaluate(registry, "good", 10, bits=0.5, days_ago=30)
    evaluate(registry, "good", 20, days_ago=30)
    evaluate(registry, "late", 10)
    gone = prune(registry, Retention(states=1, runs=0, newest=1, best=1))
    assert set(gone) == {Checkpoint(2), Checkpoint(20, "good")}
    assert registry.labels()["best"] == 1 and registry.states("good") == [10]


def test_what_is_damaged_is_not_judged(registry: Registry) -> None:
    for step in range(1, 4):
        evaluate(registry, "run-1", step)
    (registry.version_directory(1) / "manifest.json").write_text("{")
    prune(registry, Retention(newest=1, best=1))
    assert registry.version_directory(1).is_dir() and numbers(registry) == [3]


def test_nothing_goes_while_the_disk_does_not_yield_a_manifest(registry: Registry) -> None:
    for step in range(1, 4):
        evaluate(registry, "run-1", step)
    path = registry.version_directory(1) / "manifest.json"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        prune(registry, Retention(states=1, newest=1, best=1))
    assert registry.states("run-1") == [1, 2, 3]


def test_judge_gives_each_reason(registry: Registry) -> None:
    evaluate(registry, "run-1", 1)
    version, state = judge(registry, Retention(every=1))
    assert version.reasons == (
        "label best",
        "label latest",
        "newest 10",
        "best 5 of its evaluation set",
        "multiple of 1",
    )
    assert state.reasons == ("last 2 of its run", "state of version 1")


def test_a_value_out_of_range_is_named() -> None:
    for name in ("states", "best", "newest", "every", "runs"):
        with pytest.raises(InvalidArgument, match=f"{name} is -1, but must be from"):
            Retention(**{name: -1})
    with pytest.raises(InvalidArgument, match="states is 0"):
        Retention(states=0)


def test_the_environment_sets_each_value() -> None:
    assert read_retention({}) == Retention()
    environment = {f"GPTLOOP_KEEP_{name}": str(at) for at, name in enumerate(("STATES", "BEST", "NEWEST", "EVERY"), 3)}
    assert read_retention(environment | {"GPTLOOP_KEEP_RUNS": "7"}) == Retention(3, 4, 5, 6, 7)
    with pytest.raises(InvalidArgument, match="GPTLOOP_KEEP_STATES is 0"):
        read_retention({"GPTLOOP_KEEP_STATES": "0"})
