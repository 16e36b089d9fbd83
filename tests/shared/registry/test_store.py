import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from shared.errors import AlreadyExists, CorruptCheckpoint, FailedPrecondition, NotFound, RunOwnershipLost
from shared.registry.commit import reveal
from shared.registry.fence import Fence
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint, Registry
from tests.registries import disk_registry, root_of, run_folder, state_folder, version_folder
from tests.shared.registry.scenarios import RUN, make_manifest, observe


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _write_weights(folder: Path) -> None:
    _write(folder / "model.safetensors", "weights")


def publish(registry: Registry, fence: Fence | None = None, **values: object) -> VersionManifest:
    return registry.publish_version(
        fence or registry.take_over(RUN),
        _write_weights,
        lambda number, files: make_manifest(number, files, **values),
    )


def test_versions_are_numbered_upwards_and_read_as_written(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    assert (first.version, second.version) == (1, 2)
    assert disk_registry(root_of(registry)).versions() == [first, second]
    registry.verify(first)
    assert first.size_bytes == len("weights")


def test_an_error_says_that_the_registry_is_empty(registry: Registry) -> None:
    assert registry.versions() == [] and registry.labels() == {}
    with pytest.raises(NotFound, match="still empty"):
        registry.resolve("best")
    with pytest.raises(NotFound, match="no version 7"):
        registry.version(7)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_verify_names_the_damaged_file(registry: Registry, damage: str) -> None:
    manifest = publish(registry)
    path = version_folder(registry, 1) / "model.safetensors"
    match damage:
        case "flip":
            path.write_text("Weights")
        case "truncate":
            path.write_text("weight")
        case "remove":
            path.unlink()
        case "add":
            (path.parent / "stranger").touch()
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors|stranger"):
        registry.verify(manifest)


def test_a_version_with_an_unreadable_manifest_is_ignored(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    publish(registry)
    publish(registry)
    (version_folder(registry, 2) / "manifest.json").write_text("{")
    fresh = disk_registry(root_of(registry))
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert caplog.text.count("version 2 is ignored") == 1
    assert publish(fresh).version == 3


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable"), (errno.EIO, "check its disk")],
)
def test_a_failed_write_leaves_no_files_and_says_what_to_do(registry: Registry, number: int, advice: str) -> None:
    def fail(folder: Path) -> None:
        _write(folder / "model.safetensors", "half")
        raise OSError(number, os.strerror(number))

    fence = registry.take_over(RUN)
    expected = f"{re.escape(str(root_of(registry)))} cannot be written: {os.strerror(number)}; .*{advice}"
    with pytest.raises(FailedPrecondition, match=expected):
        registry.publish_version(fence, fail, make_manifest)
    with pytest.raises(FailedPrecondition, match=expected):
        registry.write_state(fence, 5, fail)
    assert registry.versions() == [] and registry.states(RUN) == []
    assert list((root_of(registry) / "staging").iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_an_error(registry: Registry) -> None:
    root_of(registry).mkdir()
    (root_of(registry) / "versions").touch()
    assert registry.versions() == []
    with pytest.raises(FailedPrecondition, match=r"/versions\); remove the file that is in the place"):
        publish(registry)
    assert not list(root_of(registry).glob("staging/*"))


def test_a_checkpoint_is_never_replaced(registry: Registry, tmp_path: Path) -> None:
    publish(registry)
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(AlreadyExists):
        reveal(staging, version_folder(registry, 1))


def test_a_process_that_lost_the_run_cannot_write_to_it(registry: Registry) -> None:
    old = registry.take_over("run-1")
    new = registry.take_over("run-1")
    with pytest.raises(RunOwnershipLost):
        publish(registry, old)
    with pytest.raises(RunOwnershipLost):
        registry.write_state(old, 5, lambda folder: _write(folder / "state", "old"))
    assert registry.versions() == [] and registry.states("run-1") == []
    registry.write_state(new, 5, lambda folder: _write(folder / "state", "new"))
    assert (registry.verified_state("run-1", 5) / "state").read_text() == "new"


def test_a_run_has_begun_once_it_keeps_anything(registry: Registry) -> None:
    registry.take_over("named", 1)
    assert not registry.has_begun("named") and not registry.has_begun("other")
    (run_folder(registry, "named") / "history.jsonl").touch()
    assert registry.has_begun("named")
    kept = registry.take_over("kept")
    registry.write_state(kept, 1, _write_weights)
    assert registry.has_begun("kept")
    registry.end_run("kept")
    registry.remove(Checkpoint(1, "kept"))
    assert registry.states("kept") == [] and registry.has_begun("kept")
    # A later run would begin with a lower token, and lose its folder at once.
    registry.take_over("again", 2)
    assert registry.has_begun("again")


def test_a_missing_or_damaged_state_is_an_error(registry: Registry) -> None:
    fence = registry.take_over("run-1")
    registry.write_state(fence, 5, lambda folder: _write(folder / "state", "whole"))
    directory = state_folder(registry, "run-1", 5)
    with pytest.raises(NotFound, match="it has states of these steps: 5"):
        registry.verified_state("run-1", 6)
    (directory / "state").write_text("whol")
    with pytest.raises(CorruptCheckpoint, match="has 4 of 5 bytes"):
        registry.verified_state("run-1", 5)


def test_a_killed_writer_leaves_no_version_and_is_swept(registry: Registry) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from shared.registry.fence import Fence
        from tests.registries import disk_registry, version_folder

        registry = disk_registry(Path(sys.argv[1]))

        def die(folder):
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        registry.write_state(registry.take_over("run-1"), 1, die)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program, str(root_of(registry))], cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL
    assert registry.states("run-1") == []
    (left,) = (root_of(registry) / "staging").iterdir()

    def sweep_meanwhile(folder: Path) -> None:
        _write_weights(folder)
        registry.sweep()
        assert list((root_of(registry) / "staging").iterdir()) == [folder.parent]

    assert left.is_dir()
    registry.write_state(registry.take_over(RUN), 1, sweep_meanwhile)
    assert registry.states(RUN) == [1]


def test_a_registry_that_was_replaced_is_read_again(registry: Registry) -> None:
    publish(registry, dataset="old")
    assert registry.versions()[0].dataset == "old"
    version_folder(registry, 1).rename(root_of(registry) / "moved")
    publish(registry, dataset="new")
    assert registry.versions()[0].dataset == "new"


def test_unknown_folders_are_reported_and_ignored(registry: Registry) -> None:
    publish(registry)
    versions = root_of(registry) / "versions"
    for name in ("007", "²", "backup", ".DS_Store"):
        (versions / name).mkdir()
    (versions / "5").touch()
    shutil.copytree(versions / "1", versions / "3")
    fresh = disk_registry(root_of(registry))
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert sorted(Path(place).name for place in fresh.store.unknown()) == ["007", "backup", "²"]
    with pytest.raises(CorruptCheckpoint, match="Not a directory"):
        fresh.version(5)
    with pytest.raises(CorruptCheckpoint, match="contains the manifest of version 1"):
        fresh.version(3)
    assert publish(fresh).version == 6


def test_files_of_the_macos_finder_are_ignored(registry: Registry) -> None:
    manifest = publish(registry)
    (version_folder(registry, 1) / ".DS_Store").touch()
    registry.verify(manifest)


def test_an_unreadable_file_is_an_error_that_names_it(registry: Registry) -> None:
    manifest = publish(registry)
    weights = version_folder(registry, 1) / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors cannot be read: Too many levels"):
        registry.verify(manifest)


def test_a_version_that_is_removed_while_it_is_read_is_not_corrupt(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    reader = disk_registry(root_of(registry))
    assert reader.versions() == [first, second]
    registry.remove(Checkpoint(2))
    with pytest.raises(NotFound, match="Version 2 was removed"):
        reader.verify(second)
    with pytest.raises(NotFound, match="There is no version 2"):
        reader.version(2)
    assert reader.versions() == [first]


def test_a_damaged_state_is_replaced_only_by_a_complete_one(registry: Registry) -> None:
    fence = registry.take_over(RUN)
    registry.write_state(fence, 5, _write_weights)
    directory = state_folder(registry, RUN, 5)
    (directory / "model.safetensors").write_text("weight")

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FailedPrecondition):
        registry.write_state(fence, 5, fail)
    assert (directory / "model.safetensors").read_text() == "weight"
    registry.write_state(fence, 5, _write_weights)
    registry.check(Checkpoint(5, RUN))
    assert not list((root_of(registry) / "staging").iterdir())


def test_a_state_in_the_wrong_folder_is_corrupt(registry: Registry) -> None:
    fence = registry.take_over(RUN)
    registry.write_state(fence, 5, _write_weights)
    directory = state_folder(registry, RUN, 5)
    directory.rename(state_folder(registry, RUN, 6))
    with pytest.raises(CorruptCheckpoint, match="contains the state of step 5"):
        registry.verified_state(RUN, 6)


def test_a_folder_with_many_unknown_files_gives_one_short_error(registry: Registry) -> None:
    manifest = publish(registry)
    for number in range(100):
        (version_folder(registry, 1) / f"{number:03}{'x' * 200}").touch()
    with pytest.raises(CorruptCheckpoint, match=r"missing or extra files: 000x+…") as raised:
        registry.verify(manifest)
    assert len(str(raised.value)) <= 300 + len(str(root_of(registry)))


def test_a_damaged_fence_is_an_error(registry: Registry) -> None:
    fence = registry.take_over(RUN)
    (run_folder(registry, RUN) / "fence").write_text("9" * 5000)
    with pytest.raises(FailedPrecondition, match=r"fence contains '9+…9+', but must contain a whole number"):
        registry.take_over(fence.run)
    (run_folder(registry, RUN) / "fence").write_text("")
    with pytest.raises(FailedPrecondition, match="fence contains '', but must contain a whole number"):
        registry.take_over(fence.run)


def test_concurrent_publishers_never_share_a_number(registry: Registry) -> None:
    program = textwrap.dedent(
        """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from shared.registry.fence import Fence
        from tests.registries import disk_registry, version_folder
        from tests.shared.registry.scenarios import make_manifest, write_model

        registry = disk_registry(Path(sys.argv[1]))
        fence = registry.take_over(sys.argv[2])

        def publish(_):
            return registry.publish_version(fence, write_model, lambda n, files: make_manifest(n, files)).version

        with ThreadPoolExecutor(4) as threads:
            print(*threads.map(publish, range(10)))
        """
    )
    command = [sys.executable, "-c", program, str(root_of(registry))]
    writers = [
        subprocess.Popen([*command, run], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
        for run in ("run-1", "run-2")
    ]
    numbers = [int(number) for writer in writers for number in writer.communicate()[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(numbers) == list(range(1, 21))
    assert len(observe(root_of(registry))) == 20 + 2
    assert not list((root_of(registry) / "staging").iterdir())


def test_the_number_of_a_removed_version_is_never_given_again(registry: Registry) -> None:
    assert [publish(registry).version for _ in range(3)] == [1, 2, 3]
    registry.remove(Checkpoint(3))
    assert publish(disk_registry(root_of(registry))).version == 4
    # Also if a person removes all versions.
    shutil.rmtree(root_of(registry) / "versions")
    assert publish(disk_registry(root_of(registry))).version == 5


def test_a_registry_of_an_older_program_continues_its_numbers(registry: Registry) -> None:
    publish(registry)
    (root_of(registry) / "last_version").unlink()
    assert publish(registry).version == 2
    assert (root_of(registry) / "last_version").read_text() == "2"


def test_an_unknown_highest_number_is_an_error(registry: Registry) -> None:
    publish(registry)
    (root_of(registry) / "last_version").write_text("many" * 1000)
    with pytest.raises(
        FailedPrecondition, match=r"last_version contains 'many.*', but must contain the highest number"
    ) as raised:
        publish(registry)
    assert len(str(raised.value)) < 300 + len(str(root_of(registry)))
    (root_of(registry) / "last_version").write_text(str(10**18 - 1))
    with pytest.raises(FailedPrecondition, match="no higher number is left"):
        publish(registry)
    assert [version.version for version in registry.versions()] == [1]


def test_folders_with_excessive_names_are_reported_and_ignored(registry: Registry) -> None:
    publish(registry)
    names = ["1" + 200 * "0", str(2**63)]
    for name in names:
        (root_of(registry) / "versions" / name).mkdir()
    runs = [os.fsdecode(b"run-\xff"), "run\nof two lines", "r" * 201]
    for name in runs:
        (root_of(registry) / "runs" / name / "states" / "1").mkdir(parents=True)
    assert registry.runs() == [RUN]
    assert [str(each) for each in registry.checkpoints()] == ["version 1"]
    assert {Path(place).name for place in registry.store.unknown()} == {*names, *runs}
    assert publish(registry).version == 2


@pytest.mark.parametrize("folder", ["versions", "staging", "runs"])
def test_a_folder_on_another_file_system_is_an_error_with_advice(registry: Registry, folder: str) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == root_of(registry).parent.stat().st_dev:
        pytest.skip("Needs a second file system.")
    target = Path(tempfile.mkdtemp(dir=elsewhere))
    try:
        root_of(registry).mkdir()
        (root_of(registry) / folder).symlink_to(target)
        with pytest.raises(FailedPrecondition, match=r"must be on one file system: use a link .* for the whole"):
            publish(registry) if folder != "runs" else registry.write_state(registry.take_over(RUN), 1, _write_weights)
        assert registry.versions() == [] and registry.states(RUN) == []
    finally:
        shutil.rmtree(target)
