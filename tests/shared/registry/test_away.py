"""A registry on a disk that is away, which is neither empty nor damaged."""

import os
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from shared.errors import FailedPrecondition, StoreFailed
from shared.registry.fence import Fence
from shared.registry.manifest import MANIFEST_NAME, manifest_of
from shared.registry.numbering import is_there
from shared.registry.registry import Registry
from tests.registries import disk_registry, root_of, run_folder
from tests.shared.registry.scenarios import RUN, publish, write_state


def test_a_registry_that_cannot_be_read_is_an_error_and_not_empty(tmp_path: Path) -> None:
    # A link to itself refuses every operation, as a file system that is gone does.
    (tmp_path / "registry").symlink_to(tmp_path / "registry")
    registry = disk_registry(tmp_path / "registry")
    for read in (registry.versions, registry.runs, registry.labels, lambda: registry.version(1)):
        with pytest.raises(StoreFailed, match=r"The registry cannot be read: Too many levels .*registry/.*; check its"):
            read()


def test_a_link_to_a_disk_that_is_not_mounted_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "registry").symlink_to(tmp_path / "absent")
    registry = disk_registry(tmp_path / "registry")
    for use in (registry.versions, registry.runs, registry.store.id, lambda: registry.take_over(RUN)):
        with pytest.raises(StoreFailed, match=r"is a link to .*absent, which cannot be followed; mount its disk"):
            use()


def test_a_file_in_the_place_of_the_registry_is_an_error_and_not_empty(tmp_path: Path) -> None:
    (tmp_path / "registry").touch()
    registry = disk_registry(tmp_path / "registry")
    for use in (registry.versions, registry.runs, registry.store.id, lambda: registry.take_over(RUN)):
        with pytest.raises(StoreFailed, match=r"registry(\)| is a file, and no folder); remove the file"):
            use()


def test_what_another_process_makes_or_removes_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "registry", tmp_path / MANIFEST_NAME
    file.touch()
    look = Path.stat

    def look_once(path: Path, **options: Any) -> os.stat_result:
        try:
            return look(path, **options)
        finally:
            if path == folder:
                with suppress(FileExistsError):
                    folder.mkdir()
            if path == file:
                file.unlink(missing_ok=True)

    monkeypatch.setattr(Path, "stat", look_once)
    assert not is_there(folder / "id")
    with pytest.raises(FileNotFoundError):
        manifest_of(tmp_path)


def test_a_version_of_a_registry_that_is_away_was_not_removed(registry: Registry) -> None:
    manifest = publish(registry)
    root = root_of(registry)
    root.rename(root.with_name("aside"))
    for target in (root.with_name("absent"), root):
        root.symlink_to(target)
        for use in (registry.verified, registry.verify, lambda each: registry.version(each.version)):
            with pytest.raises(StoreFailed):
                use(manifest)
        root.unlink()


def test_a_registry_that_goes_away_under_its_lock_does_not_look_like_a_lost_run(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    fence = registry.take_over(RUN)
    root, check = root_of(registry), Fence.check

    def check_too_late(*arguments: Any) -> None:
        root.rename(root.with_name("aside"))
        root.symlink_to(root.with_name("absent"))
        check(*arguments)

    monkeypatch.setattr(Fence, "check", check_too_late)
    with pytest.raises(StoreFailed, match="cannot be followed; mount its disk"):
        registry.store.append_history(fence, b"{}", synced=False)


def test_a_registry_that_this_user_may_not_enter_is_an_error_with_advice(tmp_path: Path) -> None:
    (tmp_path / "registry").mkdir(mode=0o000)
    script = f"""
        import os
        from pathlib import Path
        from shared.errors import GptloopError
        from tests.registries import disk_registry
        registry = disk_registry(Path({str(tmp_path / "registry")!r}))
        if os.geteuid() == 0:  # nothing is forbidden to root
            os.seteuid(65534)
        for use in (registry.versions, registry.store.id, lambda: registry.version(1), registry.sweep):
            try:
                use()
            except GptloopError as error:
                print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    said = ended.stdout.splitlines()
    advice = [
        "make it readable for this user.",
        "make it writable for this user, or name another folder in GPTLOOP_VAR.",
    ]
    assert [line.split("; ")[1] for line in said] == [advice[0], advice[1], advice[0], advice[1]]


def test_a_fence_that_cannot_be_read_is_a_failure_of_the_disk(registry: Registry) -> None:
    fence = registry.take_over(RUN)
    path = run_folder(registry, RUN) / "fence"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(StoreFailed, match="fence cannot be read"):
        write_state(registry, fence)


@pytest.mark.parametrize("name", ["id", "last_version"])
def test_a_number_that_cannot_be_read_is_not_made_anew(registry: Registry, name: str) -> None:
    publish(registry)
    registry.store.id()
    path = root_of(registry) / name
    path.unlink()
    path.symlink_to(path)
    for use in {"id": (registry.store.id,), "last_version": (lambda: publish(registry),)}[name]:
        with pytest.raises(StoreFailed, match=f"{name} is a link to .*, which cannot be followed"):
            use()
    assert path.is_symlink()


def test_a_damaged_fence_is_named_with_advice(registry: Registry) -> None:
    fence = registry.take_over(RUN)
    (run_folder(registry, RUN) / "fence").write_bytes(b"\xff")
    with pytest.raises(FailedPrecondition, match=r"fence cannot be read: .*; it must contain a whole number") as raised:
        write_state(registry, fence)
    assert not isinstance(raised.value, StoreFailed)
