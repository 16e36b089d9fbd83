import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import AlreadyExists, CorruptCheckpoint, FailedPrecondition, NotFound, RunOwnershipLost
from shared.registry import policy
from shared.registry.commit import reveal
from shared.registry.decisions import Finding
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord, VersionManifest
from shared.registry.store import Checkpoint, Registry
from tests.shared.registry.scenarios import RUN, make_manifest, observe


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _write_weights(folder: Path) -> None:
    _write(folder / "model.safetensors", "weights")


def publish(registry: Registry, fence: Fence | None = None, **values: object) -> VersionManifest:
    return registry.publish_version(
        fence or Fence.raise_for(registry.run_directory(RUN)),
        _write_weights,
        lambda number, files: make_manifest(number, files, **values),
    )


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
    assert registry.versions() == [] and registry.labels() == {}
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


def test_best_is_never_a_refused_version() -> None:
    versions = [make_manifest(number, bits_per_byte=bits) for number, bits in enumerate((0.8, 0.6, 0.7), 1)]
    assert policy.labels(versions, refused=[2]) == {"best": 3, "latest": 3}
    assert policy.labels(versions, refused=[2, 3]) == {"best": 1, "latest": 3}
    assert policy.labels(versions, refused=[1, 2, 3]) == {"latest": 3}


def test_where_the_first_version_on_a_new_text_is_refused_the_text_before_counts() -> None:
    versions = [make_manifest(1, bits_per_byte=0.5), make_manifest(2, evaluation_set="another text")]
    assert policy.labels(versions) == {"best": 2, "latest": 2}
    assert policy.labels(versions, refused=[2]) == {"best": 1, "latest": 2}


def test_a_decision_names_a_version_only_while_it_is_there() -> None:
    versions = [make_manifest(number) for number in (3, 4)]
    named = {"best": 4, "latest": 4}
    assert policy.labels(versions, stable=3, pinned=3) == named | {"stable": 3, "pinned:3": 3}
    assert policy.labels(versions, stable=2, pinned=5) == named
    assert policy.labels([], stable=3, pinned=3) == {}


@given(
    claims=st.dictionaries(st.integers(1, 9), st.sampled_from([0.5, 0.7, 0.9])),
    refused=st.sets(st.integers(1, 9)),
    stable=st.none() | st.integers(1, 9),
    pinned=st.none() | st.integers(1, 9),
)
def test_every_label_names_the_version_that_it_should(
    claims: dict[int, float], refused: set[int], stable: int | None, pinned: int | None
) -> None:
    versions = [make_manifest(number, bits_per_byte=bits) for number, bits in claims.items()]
    expected = {"stable": stable, f"pinned:{pinned}": pinned}
    expected = {label: number for label, number in expected.items() if number in claims}
    if claims:
        expected["latest"] = max(claims)
    if claims.keys() - refused:
        expected["best"] = min(claims.keys() - refused, key=lambda number: (claims[number], -number))
    assert policy.labels(versions, refused, stable, pinned) == expected


def test_what_was_found_out_about_another_version_of_the_same_number_does_not_count(registry: Registry) -> None:
    publish(registry)
    registry.decisions.keep(1, Finding("another digest", "cpu", None, "lying", "It lies.", at=1.0))
    assert registry.labels()["best"] == 1


def test_damaged_decisions_leave_the_labels_of_the_manifests(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry)
    registry.decisions.set_stable(1)
    (registry.root / "serving" / "policy").write_text("newest")
    assert registry.labels() == {"best": 1, "latest": 1}
    assert "policy cannot be understood: 'newest' is no label" in caplog.text


def judged(manifest: VersionManifest, refusal: str | None = None) -> Finding:
    return Finding(manifest.digest, "cpu", None, refusal, "It is as it is.", at=1.0)


def test_labels_follow_what_was_found_out_and_decided(registry: Registry) -> None:
    versions = [publish(registry, bits_per_byte=bits) for bits in (0.7, 0.6, 0.8, 0.9)]
    registry.decisions.keep(1, judged(versions[0]))
    assert registry.labels() == {"best": 2, "latest": 4}
    registry.decisions.keep(2, judged(versions[1], "lying"))
    registry.decisions.set_stable(3)
    registry.decisions.set_policy("pinned:2")
    expected = {"best": 1, "latest": 4, "stable": 3, "pinned:2": 2}
    assert registry.labels() == Registry(registry.root).labels() == expected
    assert {label: registry.resolve(label).version for label in expected} == expected
    registry.decisions.forget(2)
    assert registry.labels()["best"] == 2


def test_a_removed_version_takes_its_labels_and_its_finding_along(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    for manifest in (first, second):
        registry.decisions.keep(manifest.version, judged(manifest, "lying"))
    registry.decisions.set_stable(1)
    registry.decisions.set_policy("pinned:1")
    assert registry.labels() == {"latest": 2, "stable": 1, "pinned:1": 1}
    registry.remove(Checkpoint(1))
    assert registry.labels() == {"latest": 2}
    assert registry.decisions.findings([1, 2]) == {2: judged(second, "lying")}
    with pytest.raises(NotFound, match="No version has the label 'stable'"):
        registry.resolve("stable")


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


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable"), (errno.EIO, "whether its disk is there")],
)
def test_a_failed_write_leaves_nothing_and_says_what_to_do(registry: Registry, number: int, advice: str) -> None:
    def fail(folder: Path) -> None:
        _write(folder / "model.safetensors", "half")
        raise OSError(number, os.strerror(number))

    fence = Fence.raise_for(registry.run_directory(RUN))
    expected = f"{re.escape(str(registry.root))} cannot be written: {os.strerror(number)}; .*{advice}"
    with pytest.raises(FailedPrecondition, match=expected):
        registry.publish_version(fence, fail, make_manifest)
    with pytest.raises(FailedPrecondition, match=expected):
        registry.write_state(fence, RUN, 5, fail)
    assert registry.versions() == [] and registry.states(RUN) == []
    assert list((registry.root / "staging").iterdir()) == []


def test_a_file_where_the_registry_needs_a_folder_is_named(registry: Registry) -> None:
    registry.root.mkdir()
    (registry.root / "versions").touch()
    assert registry.versions() == []
    with pytest.raises(FailedPrecondition, match=r"/versions\); take away what stands where"):
        publish(registry)
    assert not list(registry.root.glob("staging/*"))


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
    (left,) = (registry.root / "staging").iterdir()

    def sweep_meanwhile(folder: Path) -> None:
        _write_weights(folder)
        registry.sweep()
        assert list((registry.root / "staging").iterdir()) == [folder.parent]

    assert left.is_dir()
    registry.write_state(Fence.raise_for(registry.run_directory(RUN)), RUN, 1, sweep_meanwhile)
    assert registry.states(RUN) == [1]


def test_a_registry_that_was_emptied_and_filled_again_is_read_anew(registry: Registry) -> None:
    publish(registry, dataset="old")
    assert registry.versions()[0].dataset == "old"
    registry.version_directory(1).rename(registry.root / "moved")
    publish(registry, dataset="new")
    assert registry.versions()[0].dataset == "new"


def _rewrite(directory: Path, **values: object) -> None:
    """Writes a manifest as another program would, with the digest of what is in it."""
    path = directory / "manifest.json"
    changed = json.loads(path.read_text()) | values
    del changed["sha256"]
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(changed | {"sha256": digest}))


def test_a_newer_programs_manifest_can_be_read(registry: Registry) -> None:
    publish(registry)
    _rewrite(registry.version_directory(1), added_later=1)
    assert Registry(registry.root).version(1).version == 1


def test_the_digest_is_that_of_the_file_and_the_same_when_it_was_read_back(registry: Registry) -> None:
    # A float that was whole stands as it was given, and a tuple as a list.
    manifest = publish(registry, claimed_loss=2, training={"rate": 1e-4, "text": "ü"}, validation_files=("a", "b"))
    file = registry.version_directory(1) / "manifest.json"
    assert manifest.digest == json.loads(file.read_text())["sha256"]
    assert Registry(registry.root).version(1).digest == manifest.digest
    assert len(manifest.digest) == 64


def _another(value: Any) -> Any:
    match value:
        case None:
            return 1
        case int() | float() | str():
            return value * 2
        case tuple():
            return (*value, value)
        case _:
            return value | {"another": 1}


def test_another_value_in_any_field_is_another_digest() -> None:
    record = FileRecord("model.safetensors", size_bytes=7, sha256="abc")
    manifest = make_manifest(1, (record,))
    names = [field.name for field in fields(manifest) if field.name != "files"]
    others = [replace(manifest, **{name: _another(getattr(manifest, name))}) for name in names]
    records = [replace(record, **{field.name: _another(getattr(record, field.name))}) for field in fields(record)]
    others += [replace(manifest, files=files) for files in ((), (record, record), *((each,) for each in records))]
    assert make_manifest(1, (record,)).digest == manifest.digest
    assert len({each.digest for each in (manifest, *others)}) == 1 + len(others)


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_a_manifest_in_which_a_bit_was_flipped_is_never_believed(place: int, bit: int) -> None:
    text = bytearray(make_manifest(1).to_json().encode())
    text[place % len(text)] ^= 1 << bit
    try:
        read = VersionManifest.from_json(text.decode())
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    # The name of the digest itself is what was hit.
    assert read == make_manifest(1)


@pytest.mark.parametrize("values", [{"bits_per_byte": None}, {"version": "1"}, {"model": []}, {"step": True}])
def test_a_manifest_with_a_value_of_another_type_is_left_out(registry: Registry, values: dict[str, object]) -> None:
    publish(registry)
    _rewrite(registry.version_directory(1), **values)
    (name,) = values
    with pytest.raises(CorruptCheckpoint, match=f"cannot be understood: {name} is "):
        Registry(registry.root).version(1)
    assert Registry(registry.root).versions() == []


def test_what_is_no_checkpoint_is_named_and_left_alone(registry: Registry) -> None:
    publish(registry)
    versions = registry.root / "versions"
    for name in ("007", "²", "backup", ".DS_Store"):
        (versions / name).mkdir()
    (versions / "5").touch()
    shutil.copytree(versions / "1", versions / "3")
    fresh = Registry(registry.root)
    assert [manifest.version for manifest in fresh.versions()] == [1]
    assert sorted(path.name for path in fresh.strangers()) == ["007", "backup", "²"]
    with pytest.raises(CorruptCheckpoint, match="Not a directory"):
        fresh.version(5)
    with pytest.raises(CorruptCheckpoint, match="holds the manifest of version 1"):
        fresh.version(3)
    assert publish(fresh).version == 6


def test_what_the_finder_leaves_in_a_folder_does_no_harm(registry: Registry) -> None:
    manifest = publish(registry)
    (registry.version_directory(1) / ".DS_Store").touch()
    registry.verify(manifest)


def test_a_file_that_cannot_be_read_is_named(registry: Registry) -> None:
    manifest = publish(registry)
    weights = registry.version_directory(1) / "model.safetensors"
    weights.unlink()
    weights.symlink_to(weights)
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors cannot be read: Too many levels"):
        registry.verify(manifest)


def test_a_version_that_goes_while_it_is_read_is_not_called_broken(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    reader = Registry(registry.root)
    assert reader.versions() == [first, second]
    registry.remove_version(2)
    with pytest.raises(NotFound, match="Version 2 was removed"):
        reader.verify(second)
    with pytest.raises(NotFound, match="There is no version 2"):
        reader.version(2)
    assert reader.versions() == [first]


def test_a_damaged_state_is_replaced_only_by_a_whole_one(registry: Registry) -> None:
    fence = Fence.raise_for(registry.run_directory(RUN))
    directory = registry.write_state(fence, RUN, 5, _write_weights)
    (directory / "model.safetensors").write_text("weight")

    def fail(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(FailedPrecondition):
        registry.write_state(fence, RUN, 5, fail)
    assert (directory / "model.safetensors").read_text() == "weight"
    registry.write_state(fence, RUN, 5, _write_weights)
    registry.check(Checkpoint(5, RUN))
    assert not list((registry.root / "staging").iterdir())


def test_a_state_in_the_wrong_place_is_not_continued(registry: Registry) -> None:
    fence = Fence.raise_for(registry.run_directory(RUN))
    directory = registry.write_state(fence, RUN, 5, _write_weights)
    directory.rename(registry.state_directory(RUN, 6))
    with pytest.raises(CorruptCheckpoint, match="holds the state of step 5"):
        registry.verified_state(RUN, 6)


def test_a_damaged_fence_is_named(registry: Registry) -> None:
    fence = Fence.raise_for(registry.run_directory(RUN))
    (fence.directory / "fence").write_text("")
    with pytest.raises(FailedPrecondition, match="fence holds '', but must hold a whole number"):
        Fence.raise_for(fence.directory)


def test_two_publishers_at_once_never_share_a_number(registry: Registry) -> None:
    program = textwrap.dedent(
        """
        import sys
        from concurrent.futures import ThreadPoolExecutor
        from pathlib import Path
        from shared.registry.fence import Fence
        from shared.registry.store import Registry
        from tests.shared.registry.scenarios import make_manifest, write_model

        registry = Registry(Path(sys.argv[1]))
        fence = Fence.raise_for(registry.run_directory(sys.argv[2]))

        def publish(_):
            return registry.publish_version(fence, write_model, lambda n, files: make_manifest(n, files)).version

        with ThreadPoolExecutor(4) as threads:
            print(*threads.map(publish, range(10)))
        """
    )
    command = [sys.executable, "-c", program, str(registry.root)]
    writers = [
        subprocess.Popen([*command, run], cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
        for run in ("run-1", "run-2")
    ]
    numbers = [int(number) for writer in writers for number in writer.communicate()[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert sorted(numbers) == list(range(1, 21))
    assert len(observe(registry.root)) == 20 + 2
    assert not list((registry.root / "staging").iterdir())
