import os
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import CorruptCheckpoint, InvalidArgument
from shared.registry.decisions import BestBy
from shared.registry.findings import Finding
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention, judge, prune
from tests.records import write_record
from tests.registries import disk_registry, root_of, state_folder, version_folder
from tests.shared.registry.scenarios import make_manifest, write_model

DAY_S = 24 * 3600.0


def evaluate(
    registry: Registry, run: str, step: int, bits: float = 1.0, text: str = "set-a", days_ago: float = 0, rows: int = 0
) -> int:
    """Writes a state and a version, as a run does at an evaluation, and returns the number of the version."""
    fence = registry.take_over(run)
    registry.write_state(fence, step, write_model)
    directory = state_folder(registry, run, step)
    written_at = time.time() - days_ago * DAY_S
    os.utime(directory, (written_at, written_at))
    training = {"batch_size": rows, "context_length": 1}
    values = {"run": run, "step": step, "bits_per_byte": bits, "evaluation_set": text, "training": training}
    manifest = registry.publish_version(
        fence, write_model, lambda number, files: make_manifest(number, files, **values)
    )
    return manifest.version


def numbers(registry: Registry) -> list[int]:
    return [manifest.version for manifest in registry.versions()]


def reasons(registry: Registry, retention: Retention) -> dict[Checkpoint, tuple[str, ...]]:
    return {verdict.checkpoint: verdict.reasons for verdict in judge(registry, retention)}


def test_the_newest_the_best_and_labelled_checkpoints_are_kept(registry: Registry) -> None:
    for version in range(1, 21):
        evaluate(registry, "run-1", 10 * version, 0.5 if version == 2 else 1.0 + version / 100)
        prune(registry, Retention())
    assert numbers(registry) == [1, 2, 3, 4, 5, *range(11, 21)]
    assert registry.labels() == {"best": 2, "latest": 20}
    assert registry.states("run-1") == [20, 190, 200]


def test_the_version_with_the_best_evaluation_is_kept_with_its_state_if_best_follows_evaluations(
    registry: Registry,
) -> None:
    sparing = Retention(states=1, best=1, newest=1)
    following = disk_registry(root_of(registry), BestBy.EVALUATION)
    for version in range(1, 6):
        evaluate(registry, "run-1", version, bits=2.0 - version / 100)
    write_record(registry, registry.version(2), 1.4)
    write_record(registry, registry.version(5), 1.5)
    prune(following, sparing)
    assert (numbers(registry), registry.states("run-1")) == ([2, 5], [2, 5])
    assert reasons(following, sparing)[Checkpoint(2)] == ("label best",)
    prune(registry, sparing)
    assert (numbers(registry), registry.states("run-1")) == ([5], [5])


def test_an_incomplete_version_is_kept_with_its_state(registry: Registry) -> None:
    for version in range(1, 15):
        evaluate(registry, "run-1", version, 0.5 if version == 1 else 1.0 + version / 100)
    path = version_folder(registry, 1) / registry.version(1).files[0].name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    prune(registry, Retention(newest=2, best=2, states=1))
    path.write_bytes(content)
    assert registry.labels()["best"] == 1
    assert registry.states("run-1") == [1, 2, 14]


def test_every_value_keeps_its_checkpoints(registry: Registry) -> None:
    for version in range(1, 13):
        evaluate(registry, "run-1", version, bits=2.0 - version / 100)
    prune(registry, Retention(states=3, best=2, newest=1, every=4))
    assert numbers(registry) == [4, 8, 11, 12]
    assert registry.states("run-1") == [10, 11, 12]
    prune(registry, Retention(states=1, best=0, newest=0))
    assert numbers(registry) == [12] and registry.states("run-1") == [12]


def test_a_model_of_another_text_is_kept_as_long_as_its_run(registry: Registry) -> None:
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


def test_pruning_never_gives_the_lead_back_to_the_previous_set(registry: Registry) -> None:
    """The version that took the lead is kept, because only it has trained enough."""
    evaluate(registry, "good", 400, rows=1)
    evaluate(registry, "other", 100, 0.5, "other text", rows=1)
    evaluate(registry, "other", 200, 0.9, "other text", rows=1)
    evaluate(registry, "toy", 1, 0.1, "third text", rows=1)
    assert registry.labels()["best"] == 2
    prune(registry, Retention(states=1, best=1, newest=0))
    assert registry.labels()["best"] == 2
    assert reasons(registry, Retention(best=1, newest=0))[Checkpoint(3)] == (
        "its evaluation set leads since this version",
    )


def test_the_best_version_of_the_followed_run_is_kept(registry: Registry) -> None:
    for step, bits in ((10, 1.2), (20, 1.1), (30, 1.3)):
        evaluate(registry, "old", step, bits, days_ago=30)
    evaluate(registry, "new", 10)
    registry.decisions.set_policy("run:old")
    prune(registry, Retention(states=1, runs=0, newest=0, best=0))
    assert numbers(registry) == [2, 4] and registry.states("old") == [20]


def test_a_run_that_may_still_train_keeps_its_states(registry: Registry) -> None:
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


def test_the_stable_and_the_pinned_version_are_kept_with_their_states(registry: Registry) -> None:
    for step in (10, 20, 30):
        evaluate(registry, "old", step, bits=1.1, days_ago=30)
    evaluate(registry, "new", 10)
    sparing = Retention(states=1, runs=0, newest=0, best=0)
    registry.decisions.set_stable(1)
    registry.decisions.set_policy("pinned:2")
    assert set(prune(registry, sparing)) == {Checkpoint(3), Checkpoint(30, "old")}
    assert reasons(registry, sparing) == {
        Checkpoint(1): ("label stable",),
        Checkpoint(10, "old"): ("state of version 1",),
        Checkpoint(2): ("label pinned:2",),
        Checkpoint(20, "old"): ("state of version 2",),
        Checkpoint(4): ("label best", "label latest"),
        Checkpoint(10, "new"): ("last 1 of its run", "state of version 4"),
    }
    registry.decisions.set_stable(2)
    registry.decisions.set_policy("best")
    assert set(prune(registry, sparing)) == {Checkpoint(1), Checkpoint(10, "old")}
    assert reasons(registry, sparing)[Checkpoint(2)] == ("label stable",)


def test_a_refused_version_does_not_keep_the_label_best(registry: Registry) -> None:
    refused = evaluate(registry, "old", 10, bits=0.5, days_ago=30)
    evaluate(registry, "old", 20, bits=0.6, days_ago=30)
    evaluate(registry, "new", 10)
    sparing = Retention(states=1, runs=0, newest=0, best=0)
    assert reasons(registry, sparing)[Checkpoint(refused)] == ("label best",)
    digest = registry.version(refused).digest
    registry.decisions.keep(refused, Finding(digest, "cpu", None, "lying", "It claims too much.", at=1.0))
    assert reasons(registry, sparing)[Checkpoint(2)] == ("label best",)
    assert set(prune(registry, sparing)) == {Checkpoint(refused), Checkpoint(10, "old")}


def test_a_damaged_version_is_not_removed(registry: Registry) -> None:
    for step in range(1, 4):
        evaluate(registry, "run-1", step)
    (version_folder(registry, 1) / "manifest.json").write_text("{")
    prune(registry, Retention(newest=1, best=1))
    assert version_folder(registry, 1).is_dir() and numbers(registry) == [3]


def test_nothing_is_removed_while_a_manifest_is_unreadable(registry: Registry) -> None:
    for step in range(1, 4):
        evaluate(registry, "run-1", step)
    path = version_folder(registry, 1) / "manifest.json"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CorruptCheckpoint, match="cannot be read"):
        prune(registry, Retention(states=1, newest=1, best=1))
    assert registry.states("run-1") == [1, 2, 3]


def test_a_verdict_has_every_reason(registry: Registry) -> None:
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


def test_a_value_out_of_range_is_an_error_that_names_it() -> None:
    for name in ("states", "best", "newest", "every", "runs"):
        with pytest.raises(InvalidArgument, match=f"{name} is -1, but must be from"):
            Retention(**{name: -1})
    with pytest.raises(InvalidArgument, match="states is 0"):
        Retention(states=0)


@pytest.mark.parametrize("content", [b"\0", None])
def test_nothing_is_removed_while_the_stable_version_is_unreadable(registry: Registry, content: bytes | None) -> None:
    for step in (10, 20, 30):
        evaluate(registry, "run-1", step)
    registry.decisions.set_stable(1)
    path = root_of(registry) / "serving" / "stable"
    path.unlink()
    if content is None:
        path.symlink_to(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match="stable cannot be"):
        prune(registry, Retention(states=1, runs=0, newest=0, best=0))
    assert numbers(registry) == [1, 2, 3]


def test_refused_versions_are_not_among_the_best(registry: Registry) -> None:
    for step, bits in ((10, 0.9), (20, 0.1), (30, 0.2), (40, 0.8)):
        evaluate(registry, "run-1", step, bits)
    for number in (2, 3):
        digest = registry.version(number).digest
        registry.decisions.keep(number, Finding(digest, "cpu", None, "lying", "It lies.", at=1.0))
    prune(registry, Retention(newest=0, best=2))
    assert numbers(registry) == [1, 4]


def test_a_version_that_a_job_waits_for_is_kept_with_its_state(registry: Registry) -> None:
    for step in (10, 20, 30):
        evaluate(registry, "run-1", step, bits=2.0 - step / 100)
    registry.holds.add("12ab", 1)
    sparing = Retention(states=1, newest=0, best=0)
    assert reasons(registry, sparing)[Checkpoint(1)] == ("job 12ab waits for it",)
    assert reasons(registry, sparing)[Checkpoint(10, "run-1")] == ("state of version 1",)
    assert set(prune(registry, sparing)) == {Checkpoint(2), Checkpoint(20, "run-1")}
    registry.holds.remove("12ab")
    assert set(prune(registry, sparing)) == {Checkpoint(1), Checkpoint(10, "run-1")}


def test_a_version_that_is_held_during_pruning_is_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20, 30):
        evaluate(registry, "run-1", step, bits=2.0 - step / 100)
    remove = registry.remove

    def remove_and_hold(checkpoint: Checkpoint, unless: Callable[[], bool]) -> bool:
        monkeypatch.setattr(registry, "remove", remove)
        removed = remove(checkpoint, unless)
        registry.holds.add("12ab", 2)
        return removed

    monkeypatch.setattr(registry, "remove", remove_and_hold)
    assert set(prune(registry, Retention(states=1, newest=0, best=0))) == {Checkpoint(1), Checkpoint(10, "run-1")}
    assert numbers(registry) == [2, 3] and registry.states("run-1") == [20, 30]


def test_a_finished_run_keeps_only_its_last_state(registry: Registry) -> None:
    for run in ("ended", "goes-on"):
        for step in (10, 20, 30):
            evaluate(registry, run, step)
    registry.end_run("ended")
    assert (registry.has_ended("ended"), registry.has_ended("goes-on")) == (True, False)
    prune(registry, Retention(newest=0, best=0))
    assert (registry.states("ended"), registry.states("goes-on")) == ([30], [20, 30])
    # A finished run is removed even if it finished a moment ago, unless it is one of the kept runs.
    prune(registry, Retention(newest=0, best=0, runs=0))
    assert (registry.states("ended"), registry.states("goes-on")) == ([], [20, 30])


def test_a_limit_on_size_removes_the_least_valuable_first(registry: Registry) -> None:
    for step, bits in ((10, 1.3), (20, 1.1), (30, 1.0), (40, 1.2), (50, 1.4)):
        evaluate(registry, "run-1", step, bits, days_ago=100 - step)
    keeping = Retention(states=4, best=3, newest=10)

    def going(limit_bytes: int) -> set[Checkpoint]:
        verdicts = judge(registry, replace(keeping, size_bytes=limit_bytes))
        assert all(verdict.reasons == () for verdict in verdicts if verdict.has_no_room)
        return {verdict.checkpoint for verdict in verdicts if verdict.has_no_room}

    # Keeps states 20 to 50; 30 belongs to the best version and 50 is the last; version 5 is the latest.
    assert {each.checkpoint for each in judge(registry, keeping) if not each.reasons} == {Checkpoint(10, "run-1")}
    rest = sum(registry.size_bytes(each.checkpoint) for each in judge(registry, keeping) if each.reasons)
    assert going(rest) == set()
    expected: set[Checkpoint] = set()
    # The worst version is kept as the latest, and of the best three only the best one.
    order = [Checkpoint(20, "run-1"), Checkpoint(40, "run-1"), Checkpoint(1), Checkpoint(4), Checkpoint(2)]
    for checkpoint in order:
        expected.add(checkpoint)
        assert going(rest - 1) == expected
        rest -= registry.size_bytes(checkpoint)
        assert going(rest) == expected
    assert going(1) == expected
    prune(registry, replace(keeping, size_bytes=1))
    assert numbers(registry) == [3, 5] and registry.states("run-1") == [30, 50]


@given(limit_bytes=st.integers(1, 10**6))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_limit_on_size_removes_a_labelled_version_or_a_last_state(
    registry_of_runs: Registry, limit_bytes: int
) -> None:
    registry = registry_of_runs
    verdicts = judge(registry, Retention(size_bytes=limit_bytes))
    gone = {each.checkpoint for each in verdicts if not each.reasons}
    labelled = {Checkpoint(number) for number in registry.labels().values()}
    last = {Checkpoint(registry.states(run)[-1], run) for run in registry.runs()}
    assert not gone & (labelled | last)
    stays = sum(registry.size_bytes(each.checkpoint) for each in verdicts if each.reasons)
    loose = [each for each in verdicts if each.reasons and not each.is_firm]
    assert stays <= limit_bytes or not loose


@pytest.fixture(scope="module")
def registry_of_runs(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = disk_registry(tmp_path_factory.mktemp("runs") / "registry")
    for step in range(1, 7):
        for run in ("run-1", "run-2"):
            evaluate(registry, run, step, bits=2.0 - step / 10)
    return registry
