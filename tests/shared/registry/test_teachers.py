import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shared.errors import CorruptCheckpoint, NotFound, RunOwnershipLost
from shared.registry.fence import Fence
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention, prune
from tests.registries import disk_registry, root_of, run_folder, state_folder, version_folder
from tests.shared.registry.scenarios import publish, take_teachers

STUDENT = "student"
SPARING = Retention(states=1, best=0, newest=1, runs=1)
MODEL = "model.safetensors"


@pytest.fixture
def versions(registry: Registry) -> list[VersionManifest]:
    """Three versions, of which the last one is the best."""
    return [publish(registry, bits_per_byte=2.0 - each / 10) for each in range(3)]


@pytest.fixture
def fence(registry: Registry, versions: list[VersionManifest]) -> Fence:
    return registry.take_over(STUDENT)


def kept(registry: Registry) -> list[int]:
    return [each.manifest.version for each in disk_registry(root_of(registry)).teachers.of(STUDENT)]


def test_a_run_keeps_its_teachers_in_their_order_under_the_files_of_the_versions(
    registry: Registry, versions: list[VersionManifest], fence: Fence
) -> None:
    assert kept(registry) == [] and registry.teachers.runs() == []
    take_teachers(registry, fence, 2, 1)
    registry.teachers.verify(STUDENT)
    assert registry.teachers.runs() == [STUDENT]
    for teacher, version in zip(registry.teachers.of(STUDENT), (versions[1], versions[0]), strict=True):
        assert teacher.manifest == version
        assert (teacher.folder / MODEL).samefile(version_folder(registry, version.version) / MODEL)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV])
def test_a_file_system_without_hard_links_gets_copies(
    registry: Registry, fence: Fence, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    take_teachers(registry, fence, 1)
    (teacher,) = registry.teachers.of(STUDENT)
    assert (teacher.folder / MODEL).stat().st_nlink == 1
    version_folder(registry, 1).joinpath(MODEL).write_bytes(b"")
    registry.teachers.verify(STUDENT)


def test_a_teacher_outlives_its_version(registry: Registry, fence: Fence) -> None:
    take_teachers(registry, fence, 1, 2)
    prune(registry, SPARING)
    assert [each.version for each in registry.versions()] == [3]
    registry.teachers.verify(STUDENT)
    assert kept(registry) == [1, 2]


def test_teachers_go_with_the_last_state_of_their_run(registry: Registry, fence: Fence) -> None:
    def age() -> None:
        os.utime(run_folder(registry, STUDENT) / "teachers" / "1", (0, 0))

    def pruned(runs: int) -> list[int]:
        prune(registry, Retention(runs=runs))
        return kept(registry)

    take_teachers(registry, fence, 1)
    # A run that has just begun has no state yet.
    assert pruned(runs=0) == [1]
    age()
    registry.write_state(fence, 5, lambda folder: (folder / MODEL).touch())
    state = state_folder(registry, STUDENT, 5)
    registry.end_run(STUDENT)
    assert pruned(runs=1) == [1] and state.exists()
    assert pruned(runs=0) == [] and not state.exists()
    assert registry.teachers.runs() == []
    assert [path.name for path in run_folder(registry, STUDENT).iterdir() if "teacher" in path.name] == []
    assert registry.version(1).version == 1


def test_a_process_that_lost_the_run_takes_no_teachers(registry: Registry, fence: Fence) -> None:
    registry.teachers.take(fence, version_folder(registry, 1))
    newer = registry.take_over(fence.run)
    with pytest.raises(RunOwnershipLost):
        registry.teachers.take(fence, version_folder(registry, 2))
    with pytest.raises(RunOwnershipLost):
        registry.teachers.keep(fence, [1])
    assert kept(registry) == [] and not list((root_of(registry) / "staging").iterdir())
    take_teachers(registry, newer, 2)
    assert kept(registry) == [2]


def test_a_run_killed_before_it_names_its_teachers_has_none_and_takes_them_again(
    registry: Registry, fence: Fence
) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from shared.registry.fence import Fence
        from tests.registries import disk_registry, version_folder

        registry = disk_registry(Path(sys.argv[1]))
        fence = registry.take_over("student")
        registry.teachers.take(fence, version_folder(registry, 1))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program, str(root_of(registry))], cwd=Path(__file__).parents[3])
    assert ended.returncode == -signal.SIGKILL
    assert kept(registry) == []
    take_teachers(registry, registry.take_over(fence.run), 1, 3)
    assert kept(registry) == [1, 3]


def test_a_damaged_teacher_is_never_named(registry: Registry, fence: Fence) -> None:
    (version_folder(registry, 2) / MODEL).write_bytes(b"")
    with pytest.raises(CorruptCheckpoint, match=r"student/teachers/2 lacks files .*model\.safetensors has 0 of"):
        take_teachers(registry, fence, 1, 2)
    assert kept(registry) == []


def test_a_version_that_is_gone_cannot_teach(registry: Registry, fence: Fence) -> None:
    registry.remove(Checkpoint(2))
    with pytest.raises(NotFound, match="Version 2 has been removed, so it cannot teach"):
        registry.teachers.take(fence, version_folder(registry, 2))


def test_damage_to_a_kept_teacher_is_an_error_that_names_the_file(registry: Registry, fence: Fence) -> None:
    take_teachers(registry, fence, 1, 2)
    folder = run_folder(registry, STUDENT) / "teachers"
    (folder / "2" / MODEL).unlink()
    with pytest.raises(CorruptCheckpoint, match=r"teachers/2 lacks files of its manifest: model\.safetensors"):
        registry.teachers.verify(STUDENT)
    (folder / "1").rename(folder / "2" / "1")
    with pytest.raises(CorruptCheckpoint, match=r"teachers/1/manifest\.json cannot be read"):
        registry.teachers.of(STUDENT)
    (folder / "2" / "1").rename(folder / "1")
    (folder / "1" / "manifest.json").write_text((version_folder(registry, 3) / "manifest.json").read_text())
    with pytest.raises(CorruptCheckpoint, match="another version than the teacher that run student began with"):
        registry.teachers.of(STUDENT)


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 10_000, "{}", '{"teachers": [1]}', '{"teachers": [{"version": "1", "digest": "d"}]}']
)
def test_an_unreadable_list_of_teachers_is_an_error(registry: Registry, fence: Fence, content: str) -> None:
    take_teachers(registry, fence, 1)
    (run_folder(registry, STUDENT) / "teachers.json").write_text(content)
    with pytest.raises(CorruptCheckpoint, match=r"teachers\.json cannot be understood: .+\."):
        registry.teachers.of(STUDENT)


def test_a_teacher_is_found_by_its_number_and_digest(
    registry: Registry, versions: list[VersionManifest], fence: Fence
) -> None:
    take_teachers(registry, fence, 1)
    found = registry.teachers.taught_by(STUDENT, 1, versions[0].digest)
    assert found is not None and found.manifest == versions[0]
    for number, digest in ((2, versions[1].digest), (1, versions[1].digest)):
        assert registry.teachers.taught_by(STUDENT, number, digest) is None
    assert registry.teachers.taught_by("other", 1, versions[0].digest) is None


def test_unknown_names_among_teachers_are_reported(registry: Registry, fence: Fence) -> None:
    take_teachers(registry, fence, 1)
    ((run_folder(registry, STUDENT) / "teachers") / "007").mkdir()
    assert [Path(place).name for place in registry.store.unknown()] == ["007"]


def test_the_list_of_teachers_holds_numbers_and_digests(
    registry: Registry, versions: list[VersionManifest], fence: Fence
) -> None:
    take_teachers(registry, fence, 3)
    content = json.loads((run_folder(registry, STUDENT) / "teachers.json").read_text())
    assert content == {"teachers": [{"version": 3, "digest": versions[2].digest}]}
