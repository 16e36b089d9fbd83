import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import AlreadyExists, CorruptCheckpoint, NotFound, RunOwnershipLost
from shared.registry.commit import reveal
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.retention import KEPT_NEWEST_VERSIONS, prune
from shared.registry.store import Registry


def make_manifest(version: int, files: tuple[FileRecord, ...] = (), **values: object) -> VersionManifest:
    manifest = VersionManifest(
        version=version,
        run="run-1",
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


def publish(registry: Registry, fence: Fence | None = None, **values: object) -> VersionManifest:
    return registry.publish_version(
        fence or Fence.raise_for(registry.run_directory("run-1")),
        lambda folder: _write(folder / "model.safetensors", "weights"),
        lambda number, files: make_manifest(number, files, **values),
    )


def _write(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_versions_are_numbered_upwards_and_read_back_as_written(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    assert (first.version, second.version) == (1, 2)
    assert Registry(registry.root).versions() == [first, second]
    registry.verify(first)
    assert first.size_bytes == len("weights")


def test_an_empty_registry_says_so(registry: Registry) -> None:
    assert registry.versions() == [] and registry.best() is None and registry.latest() is None
    with pytest.raises(NotFound, match="still empty"):
        registry.resolve("best")
    with pytest.raises(NotFound, match="no version 7"):
        registry.version(7)


def test_best_is_the_lowest_bits_per_byte_on_the_newest_evaluation_set(registry: Registry) -> None:
    publish(registry, bits_per_byte=0.1, evaluation_set="another text")
    publish(registry, bits_per_byte=0.9)
    publish(registry, bits_per_byte=0.7)
    publish(registry, bits_per_byte=0.8)
    assert registry.labels() == {"best": 3, "latest": 4}
    assert registry.resolve("best").version == 3
    with pytest.raises(NotFound, match=r"best \(version 3\)"):
        registry.resolve("stable")


def test_of_equally_good_versions_the_newest_is_best(registry: Registry) -> None:
    publish(registry)
    publish(registry)
    assert registry.labels()["best"] == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "add"])
def test_verify_names_what_is_wrong(registry: Registry, damage: str) -> None:
    manifest = publish(registry)
    path = registry.version_directory(1) / "model.safetensors"
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


def test_a_version_with_an_unreadable_manifest_is_left_out(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry)
    publish(registry)
    (registry.version_directory(2) / "manifest.json").write_text("{")
    fresh = Registry(registry.root)
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert caplog.text.count("version 2 is left out") == 1
    assert publish(fresh).version == 3


def test_a_failed_write_leaves_nothing(registry: Registry) -> None:
    def fail(folder: Path) -> None:
        _write(folder / "model.safetensors", "half")
        raise OSError("No space left on device")

    fence = Fence.raise_for(registry.run_directory("run-1"))
    with pytest.raises(OSError, match="No space"):
        registry.publish_version(fence, fail, make_manifest)
    with pytest.raises(OSError, match="No space"):
        registry.write_state(fence, "run-1", 5, fail)
    assert registry.versions() == [] and registry.states("run-1") == []
    assert list((registry.root / "staging").iterdir()) == []


def test_a_checkpoint_is_never_replaced(registry: Registry, tmp_path: Path) -> None:
    publish(registry)
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(AlreadyExists):
        reveal(staging, registry.version_directory(1))


def test_who_lost_the_run_cannot_write_it(registry: Registry) -> None:
    old = Fence.raise_for(registry.run_directory("run-1"))
    new = Fence.raise_for(registry.run_directory("run-1"))
    with pytest.raises(RunOwnershipLost):
        publish(registry, old)
    with pytest.raises(RunOwnershipLost):
        registry.write_state(old, "run-1", 5, lambda folder: _write(folder / "state", "old"))
    assert registry.versions() == [] and registry.states("run-1") == []
    registry.write_state(new, "run-1", 5, lambda folder: _write(folder / "state", "new"))
    assert (registry.verified_state("run-1", 5) / "state").read_text() == "new"


def test_a_missing_or_damaged_state_is_named(registry: Registry) -> None:
    fence = Fence.raise_for(registry.run_directory("run-1"))
    directory = registry.write_state(fence, "run-1", 5, lambda folder: _write(folder / "state", "whole"))
    with pytest.raises(NotFound, match="its states are of the steps: 5"):
        registry.verified_state("run-1", 6)
    (directory / "state").write_text("whol")
    with pytest.raises(CorruptCheckpoint, match="has 4 bytes"):
        registry.verified_state("run-1", 5)


def test_a_killed_writer_leaves_no_version_and_is_swept(registry: Registry) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from shared.registry.fence import Fence
        from shared.registry.store import Registry

        registry = Registry(Path(sys.argv[1]))

        def die(folder):
            (folder / "model.safetensors").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        registry.write_state(Fence.raise_for(registry.run_directory("run-1")), "run-1", 1, die)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program, str(registry.root)], cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL
    assert registry.states("run-1") == []
    own = registry.root / "staging" / f"{os.getpid()}-living"
    own.mkdir()
    assert len(list((registry.root / "staging").iterdir())) == 2
    registry.sweep()
    assert list((registry.root / "staging").iterdir()) == [own]


def test_retention_keeps_the_newest_the_best_and_what_a_label_needs(registry: Registry) -> None:
    fence = Fence.raise_for(registry.run_directory("run-1"))
    for version in range(1, 21):
        registry.write_state(fence, "run-1", 10 * version, lambda folder: _write(folder / "state", "s"))
        publish(registry, fence, bits_per_byte=0.5 if version == 2 else 1.0 + version / 100)
        prune(registry, "run-1")
    kept = [manifest.version for manifest in registry.versions()]
    assert kept[-KEPT_NEWEST_VERSIONS:] == list(range(11, 21))
    assert kept[0:2] == [1, 2] and registry.labels()["best"] == 2
    assert registry.states("run-1") == [20, 190, 200]


def test_retention_keeps_the_best_of_another_text(registry: Registry) -> None:
    publish(registry, bits_per_byte=0.5, evaluation_set="another text")
    for _ in range(2 * KEPT_NEWEST_VERSIONS):
        publish(registry)
    prune(registry, "run-1")
    assert registry.versions()[0].version == 1


def test_a_registry_that_was_emptied_and_filled_again_is_read_anew(registry: Registry) -> None:
    publish(registry, dataset="old")
    assert registry.versions()[0].dataset == "old"
    registry.version_directory(1).rename(registry.root / "moved")
    publish(registry, dataset="new")
    assert registry.versions()[0].dataset == "new"


def test_a_newer_programs_manifest_can_be_read(registry: Registry) -> None:
    publish(registry)
    path = registry.version_directory(1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_later": 1}))
    assert Registry(registry.root).version(1).version == 1
