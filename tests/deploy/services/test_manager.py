import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.launch import holder
from deploy.services.installation import Installation, read_installation
from deploy.services.manager import (
    Manager,
    install,
    installed_environment,
    manager_of,
    refuse_services,
    uninstall,
)
from shared.errors import AlreadyExists, FailedPrecondition
from shared.service.settings import Directories
from tests.waiting import wait_until
from tests.workplace import PROJECT


@pytest.fixture(params=["darwin", "linux"])
def manager(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    for name in ("launchctl", "systemctl"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return manager_of({"HOME": str(tmp_path / "home")}, request.param)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return read_installation({"GPTLOOP_VAR": str(tmp_path / "var"), "PATH": "/bin"})


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def _holding(installation: Installation, name: str) -> Iterator[int]:
    """Runs a program under the lock of a process; yields its pid."""
    lock = installation.directories.var / "run" / f"{name}.lock"
    program = subprocess.Popen([sys.executable, "-m", "deploy.launch", lock, "/bin/sleep", "1000"], cwd=PROJECT)
    try:
        wait_until(lambda: holder(lock) == program.pid)
        yield program.pid
    finally:
        program.kill()
        program.wait()


def test_uninstall_removes_exactly_what_install_wrote(
    manager: Manager, installation: Installation, tmp_path: Path
) -> None:
    written = install(manager, installation)
    for other in ("ungptloop.service", "gptloops.plist", "gptloop"):
        written[0].with_name(other).write_text("a person's own")
    before = _contents(tmp_path / "home")
    assert sorted(uninstall(manager)) == sorted(written)
    after = _contents(tmp_path / "home")
    assert set(before) - set(after) == set(written)
    assert {path.name for path in after} == {"ungptloop.service", "gptloops.plist", "gptloop"}
    assert uninstall(manager) == []


def test_install_again_changes_nothing_and_new_settings_replace_old_ones(
    manager: Manager, installation: Installation, tmp_path: Path
) -> None:
    install(manager, installation)
    before = _contents(tmp_path / "home")
    install(manager, installation)
    assert _contents(tmp_path / "home") == before
    other = dict(installation.environment) | {"REDIS_URL": "redis://localhost"}
    external = replace(installation, environment=other, processes=installation.processes[1:])
    install(manager, external)
    assert len(_contents(tmp_path / "home")) == len(before) - 1
    assert installed_environment(manager) == other


def test_the_link_that_enables_the_services_goes_with_them(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/systemctl")
    systemd = manager_of({"HOME": str(tmp_path)}, "linux")
    (*_, target) = install(systemd, installation)
    link = target.parent / "default.target.wants" / target.name
    link.parent.mkdir()
    link.symlink_to(target)
    install(systemd, installation)
    assert link.exists()
    assert link in uninstall(systemd)
    assert not link.is_symlink()


def test_services_of_another_folder_are_not_replaced(manager: Manager, installation: Installation) -> None:
    install(manager, installation)
    with pytest.raises(AlreadyExists, match=re.escape(f"{installation.directories.var}', are installed")):
        install(manager, replace(installation, directories=Directories(installation.directories.var / "other")))


def test_a_machine_without_the_service_manager_is_named(
    manager: Manager, installation: Installation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedPrecondition, match=f"There is no {manager.program} on PATH"):
        install(manager, installation)
    assert not manager.installed()


@pytest.mark.slow
def test_services_are_not_installed_while_gptloop_up_runs(manager: Manager, installation: Installation) -> None:
    with _holding(installation, "supervisord"), pytest.raises(FailedPrecondition, match="run `gptloop down` first"):
        install(manager, installation)
    assert not manager.installed()


@pytest.mark.slow
def test_services_that_run_are_not_removed(manager: Manager, installation: Installation) -> None:
    files = install(manager, installation)
    with _holding(installation, "worker") as pid:
        with pytest.raises(FailedPrecondition, match=rf"worker \(pid {pid}\)") as caught:
            uninstall(manager)
        assert manager.stop in str(caught.value)
    assert manager.installed() == files


def test_gptloop_up_leaves_a_folder_with_services_alone(manager: Manager, installation: Installation) -> None:
    refuse_services(manager, installation.directories)
    install(manager, installation)
    with pytest.raises(FailedPrecondition, match="gptloop service status"):
        refuse_services(manager, installation.directories)
    refuse_services(manager, Directories(installation.directories.var / "other"))
