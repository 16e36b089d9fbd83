"""What every store keeps: the same tests on a disk and on object storage."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from shared.errors import FailedPrecondition, NotFound, RunOwnershipLost
from shared.registry.disk_store import DiskStore
from shared.registry.fence import Fence
from shared.registry.findings import Finding
from shared.registry.object_store import ObjectStore
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention, prune
from shared.registry.store import Store, Texts
from tests.records import record
from tests.shared.registry.scenarios import RUN, make_line, make_manifest, publish, write_model

# Returns a registry of another process in the same place.
Open = Callable[[], Registry]

OTHER = "größe.2"


@pytest.fixture(params=["disk", pytest.param("objects", marks=pytest.mark.slow)])
def opened(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    if request.param == "disk":
        return lambda: Registry(DiskStore(tmp_path / "registry"))
    place = request.getfixturevalue("object_server").place()
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)
    return lambda: Registry(ObjectStore(place.url, tmp_path / "cache", 1 << 30))


@pytest.fixture
def registry(opened: Open) -> Registry:
    return opened()


@pytest.fixture
def fence(registry: Registry) -> Fence:
    return registry.take_over(RUN)


def write_state(registry: Registry, fence: Fence, step: int) -> None:
    registry.write_state(fence, step, write_model)


def test_an_empty_place_is_an_empty_registry(registry: Registry) -> None:
    assert registry.versions() == [] and registry.runs() == [] and registry.labels() == {}
    assert registry.checkpoints() == [] and registry.holds.jobs() == {} and registry.decisions.stable() is None
    assert registry.store.unknown() == [] and not registry.has_begun(RUN)
    registry.sweep()
    with pytest.raises(NotFound, match="still empty"):
        registry.version(1)
    with pytest.raises(NotFound, match="no longer has a state of step 1"):
        registry.verified_state(RUN, 1)


def test_a_version_is_read_elsewhere_as_it_was_written(opened: Open, registry: Registry, fence: Fence) -> None:
    published = [publish(registry, fence), publish(registry, fence)]
    assert [each.version for each in published] == [1, 2]
    other = opened()
    assert other.versions() == published and other.version(2) == published[1]
    for folder in (other.fetch(published[1]), other.verified(published[1])):
        assert (folder / "model.safetensors").read_bytes() == bytes(range(256)) * 40
        assert (folder / "manifest.json").read_text() == published[1].to_json()
    other.check(Checkpoint(1))
    assert other.size_bytes(Checkpoint(1)) == published[0].size_bytes + len(published[0].to_json())


def test_a_state_is_read_elsewhere_as_it_was_written(opened: Open, registry: Registry) -> None:
    for run in (RUN, OTHER):
        fence = registry.take_over(run)
        for step in (0, 5):
            write_state(registry, fence, step)
    other = opened()
    assert other.runs() == sorted([RUN, OTHER]) and other.states(OTHER) == [0, 5]
    assert (other.verified_state(OTHER, 5) / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert other.written_at(Checkpoint(5, OTHER)) >= other.written_at(Checkpoint(0, OTHER)) > 0
    other.check(Checkpoint(5, OTHER))
    other.end_run(OTHER)
    assert registry.has_ended(OTHER) and not registry.has_ended(RUN) and registry.has_begun(OTHER)


def test_whoever_was_replaced_writes_nothing_any_more(opened: Open, registry: Registry, fence: Fence) -> None:
    publish(registry, fence)
    source = registry.fetch(registry.version(1))
    writer = registry.histories.writer(fence, 0)
    writer.append(make_line(1), synced=True)
    newer = opened().take_over(RUN)
    acts: list[Callable[[], object]] = [
        lambda: publish(registry, fence),
        lambda: write_state(registry, fence, 5),
        lambda: registry.teachers.take(fence, source),
        lambda: registry.teachers.keep(fence, []),
        lambda: writer.append(make_line(2), synced=True),
        lambda: registry.histories.writer(fence, 0).append(make_line(3), synced=True),
        lambda: registry.take_over(RUN, fence.token),
    ]
    for act in acts:
        with pytest.raises(RunOwnershipLost, match="took over the run run-1"):
            act()
    other = opened()
    assert len(other.versions()) == 1 and other.states(RUN) == [] and other.teachers.runs() == []
    assert other.histories.read(RUN).evaluations == (make_line(1),)
    assert publish(other, newer).version > 1
    assert other.take_over(RUN, newer.token) == newer


def test_publishers_at_the_same_time_never_share_a_number(opened: Open) -> None:
    def work(number: int) -> list[int]:
        registry = opened()
        fence = registry.take_over(f"run-{number}")
        begin.wait()
        return [publish(registry, fence, run=fence.run).version for _ in range(4)]

    opened().store.id()
    begin = Barrier(6)
    with ThreadPoolExecutor(6) as threads:
        numbers = [each for found in threads.map(work, range(6)) for each in found]
    assert sorted(numbers) == list(range(1, 25))
    versions = opened().versions()
    assert [each.version for each in versions] == list(range(1, 25))
    assert {each.run for each in versions} == {f"run-{number}" for number in range(6)}


def test_the_number_of_a_removed_version_is_never_given_again(opened: Open, registry: Registry, fence: Fence) -> None:
    for _ in range(3):
        publish(registry, fence)
    version = registry.version(3)
    assert registry.remove(Checkpoint(3)) and not registry.remove(Checkpoint(3))
    assert [each.version for each in opened().versions()] == [1, 2]
    for act in (registry.verify, opened().verified):
        with pytest.raises(NotFound, match="Version 3 was removed"):
            act(version)
    assert publish(opened(), fence).version == 4


def test_what_is_known_of_a_version_goes_with_it(opened: Open, registry: Registry, fence: Fence) -> None:
    version = publish(registry, fence)
    registry.decisions.keep(1, Finding(version.digest, "cpu", 2.0, None, "", at=1.0))
    registry.evaluations.write(1, "aa", record(version.digest, 1.5, measured_at=100.0))
    assert opened().decisions.findings() != {} and opened().evaluations.of([version]) != {}
    registry.remove(Checkpoint(1))
    assert opened().decisions.findings() == {} and opened().evaluations.of([version]) == {}
    registry.evaluations.write(1, "aa", record(version.digest, 1.5, measured_at=100.0))
    assert registry.store.stamps("evaluations") == {}


@pytest.mark.parametrize("checkpoint", [Checkpoint(1), Checkpoint(1, RUN)], ids=str)
def test_what_somebody_needs_by_then_is_not_removed(
    opened: Open, registry: Registry, fence: Fence, checkpoint: Checkpoint
) -> None:
    publish(registry, fence)
    write_state(registry, fence, 1)

    assert not registry.remove(checkpoint, unless=lambda: True)
    for each in (registry, opened()):
        assert checkpoint in each.checkpoints()
        each.check(checkpoint)
    assert opened().remove(checkpoint, unless=lambda: False)
    assert checkpoint not in registry.checkpoints()


def test_a_failed_write_leaves_nothing(opened: Open, registry: Registry, fence: Fence) -> None:
    def fail(folder: Path) -> None:
        write_model(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(FailedPrecondition, match="No space left"):
        registry.publish_version(fence, fail, make_manifest)
    with pytest.raises(FailedPrecondition, match="No space left"):
        registry.write_state(fence, 1, fail)
    assert opened().checkpoints() == []
    assert publish(registry, fence).version == 1


def test_no_change_of_texts_is_lost(opened: Open, registry: Registry) -> None:
    stores = [opened().store for _ in range(4)]

    def change(number: int) -> None:
        store: Store = stores[number % 4]
        store.change("serving", lambda texts: {f"findings/{number}.cpu.json": f"{number}", "stable": "1"})
        store.change("serving", lambda texts: {"policy": str(int(texts.get("policy", "0")) + 1)})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(change, range(12)))
    texts = registry.store.read("serving")
    assert texts["policy"] == "12" and texts.written_at("policy") > 1e9 and "none" not in texts
    assert {name for name in texts if name.startswith("findings/")} == {f"findings/{n}.cpu.json" for n in range(12)}
    registry.store.change("serving", lambda _: {"policy": None, "findings/3.cpu.json": None})
    texts = opened().store.read("serving")
    assert texts.get("policy") is None and "findings/3.cpu.json" not in texts and texts["stable"] == "1"


def test_an_error_in_a_change_changes_nothing(opened: Open, registry: Registry) -> None:
    registry.decisions.set_stable(3)

    def fail(_: object) -> dict[str, str]:
        raise RunOwnershipLost("lost")

    with pytest.raises(RunOwnershipLost):
        registry.store.change("serving", fail)
    assert opened().decisions.stable() == 3


def test_holds_are_added_handed_over_and_removed(opened: Open, registry: Registry) -> None:
    registry.holds.add("a", 7, "run:wide")
    registry.holds.add("b", 9)
    registry.holds.hand_over("a", "c")
    assert opened().holds.jobs() == {7: "c", 9: "b"} and opened().holds.runs() == {"wide": "c"}
    assert all(0 <= age < 60 for age in opened().holds.ages_s().values())
    opened().holds.remove("b")
    registry.holds.remove("b")
    assert list(registry.holds.ages_s()) == ["c"]


def test_figures_are_read_again_only_if_they_change(
    opened: Open, registry: Registry, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [publish(registry, fence), publish(registry, fence)]
    for version in versions:
        registry.evaluations.write(version.version, "aa", record(version.digest, 1.5, measured_at=100.0))
    reader, read = opened(), list[str]()
    whole = reader.store.read

    def count(group: str) -> Texts:
        read.append(group)
        return whole(group)

    monkeypatch.setattr(reader.store, "read", count)
    assert set(reader.evaluations.of(versions)) == {1, 2}
    registry.evaluations.write(2, "aa", record(versions[1].digest, 1.25, measured_at=200.0))
    assert reader.evaluations.of(versions)[2][0].bits_per_byte == 1.25
    assert read == ["evaluations/1", "evaluations/2", "evaluations/2"]


def test_a_history_is_read_as_it_grows_and_cut_back(opened: Open, registry: Registry, fence: Fence) -> None:
    reader, writer = opened().histories.reader(RUN), registry.histories.writer(fence, 0)
    with pytest.raises(FileNotFoundError):
        reader.read()
    writer.append(make_line(1, 1), make_line(2, 2), synced=True)
    assert reader.read() == ([make_line(1, 1), make_line(2, 2)], False)
    writer.append(make_line(3, 3))
    writer.append(synced=True)
    assert reader.read() == ([make_line(3, 3)], False) and reader.read() == ([], False)
    newer = opened()
    writer = newer.histories.writer(newer.take_over(RUN), 1, make_line(1, 1))
    writer.append(make_line(4), synced=True)
    assert reader.read() == ([make_line(1, 1), make_line(4)], True)
    assert list(newer.histories.ages_s()) == [RUN]
    newer.histories.remove(RUN)
    assert list(registry.histories.ages_s()) == [] and not opened().histories.ages_s()


def test_teachers_outlive_their_versions(opened: Open, registry: Registry, fence: Fence) -> None:
    versions = [publish(registry, fence) for _ in range(2)]
    student = registry.take_over("student")
    for version in reversed(versions):
        registry.teachers.take(student, registry.fetch(version))
    registry.teachers.keep(student, [2, 1])
    registry.remove(Checkpoint(2))
    other = opened().teachers
    assert [each.manifest for each in other.of("student")] == [versions[1], versions[0]]
    assert (other.of("student")[0].folder / "config.json").read_text() == "{}"
    other.verify("student")
    assert other.runs() == ["student"] and 0 <= other.age_s("student") < 60
    other.remove("student")
    assert registry.teachers.runs() == [] and registry.teachers.of("student") == []


def test_a_version_that_is_removed_meanwhile_cannot_teach(registry: Registry, fence: Fence, tmp_path: Path) -> None:
    folder = registry.fetch(publish(registry, fence))
    shutil.rmtree(folder)
    with pytest.raises(NotFound, match="cannot teach"):
        registry.teachers.take(fence, folder)


def test_pruning_keeps_the_same(opened: Open, registry: Registry, fence: Fence) -> None:
    for step in range(1, 7):
        write_state(registry, fence, step)
        publish(registry, fence, step=step, bits_per_byte=2 - step % 4 / 10)
    registry.decisions.set_stable(2)
    registry.holds.add("job", 4)
    gone = prune(registry, Retention(states=1, best=1, newest=1, runs=0))
    assert gone == [Checkpoint(1), Checkpoint(5), Checkpoint(1, RUN), Checkpoint(5, RUN)]
    other = opened()
    assert [each.version for each in other.versions()] == other.states(RUN) == [2, 3, 4, 6]
    for checkpoint in other.checkpoints():
        other.check(checkpoint)


def test_a_version_that_is_held_during_pruning_is_kept(
    opened: Open, registry: Registry, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 4):
        write_state(registry, fence, step)
        publish(registry, fence, step=step, bits_per_byte=2 - step / 10)
    remove = registry.remove

    def hold_and_remove(checkpoint: Checkpoint, unless: Callable[[], bool]) -> bool:
        opened().holds.add("job", 2)
        return remove(checkpoint, unless)

    monkeypatch.setattr(registry, "remove", hold_and_remove)
    gone = prune(registry, Retention(states=1, best=0, newest=0, runs=0))
    assert gone == [Checkpoint(1), Checkpoint(1, RUN)]
    assert [each.version for each in opened().versions()] == opened().states(RUN) == [2, 3]


def test_a_registry_keeps_its_id(opened: Open) -> None:
    with ThreadPoolExecutor(8) as threads:
        (id,) = set(threads.map(lambda _: opened().store.id(), range(16)))
    assert opened().store.id() == id and len(id) == 16
