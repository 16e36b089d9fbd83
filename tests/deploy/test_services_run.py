"""The services under a real systemd, and under an imitation of launchd: real processes, real signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from deploy.launch import holder
from deploy.ports import Ports, free_ports
from deploy.service import service_statuses
from deploy.services.installation import read_installation
from deploy.services.manager import install, manager_of, running_processes, uninstall
from shared.pb.training.v1 import training_pb2 as pb
from shared.service.settings import Directories
from tests.deploy.service_managers import Agents, UserManager
from tests.end_to_end.conftest import PROJECT, TINY, is_progress, share_kernels
from tests.registries import disk_registry
from tests.waiting import HANG_S, wait_until
from trainer_service.client import TrainerClient
from trainer_service.jobs.requests import TrainRequest

pytestmark = pytest.mark.slow

NAME = """sp ace %h %d " o'ne $HOME \\ ü"""


@pytest.fixture
def ports() -> Ports:
    return free_ports()


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    directories = Directories(tmp_path / NAME / "gptloop" / "var")
    directories.var.mkdir(parents=True)
    share_kernels(directories)
    return directories


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[UserManager]:
    manager = UserManager(tmp_path / "home")
    if manager.why_not:
        pytest.skip(manager.why_not)
    yield manager
    manager.end()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    agents = Agents(tmp_path / "home")
    yield agents
    agents.stop()


def _start_training(ports: Ports, directories: Directories) -> str:
    """Returns the run of a job that trains."""
    with closing(TrainerClient(f"127.0.0.1:{ports.trainer}")) as trainer:
        job = trainer.submit(TrainRequest(overrides=TINY | {"max_steps": "100000"})).job.id
        assert any(is_progress(10)(event) for event in trainer.watch(job, timeout_s=HANG_S))
        assert trainer.job(job).state == pb.JOB_STATE_RUNNING
    (run,) = disk_registry(directories.registry).runs()
    return run


def _has_last_state(directories: Directories, run: str) -> bool:
    return disk_registry(directories.registry).states(run)[-1] >= 10


def test_systemd_runs_restarts_and_stops_everything(
    systemd: UserManager, directories: Directories, ports: Ports
) -> None:
    project = directories.var.parent
    for package in ("deploy", "inference_service", "shared", "trainer_service"):
        shutil.copytree(PROJECT / package, project / package)

    def gptloop(*words: str) -> subprocess.CompletedProcess[str]:
        own = {name: text for name, text in os.environ.items() if name not in ("REDIS_URL", "GPTLOOP_VAR")}
        return subprocess.run(
            [sys.executable, "-m", "deploy.cli", *words],
            cwd=project,
            env=own | systemd.environment | ports.to_environment(),
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )

    def is_healthy() -> bool:
        return all(each.is_healthy for each in service_statuses(manager_of(systemd.environment, "linux")))

    def pid(name: str) -> int:
        return holder(directories.var / "run" / f"{name}.lock") or 0

    installed = gptloop("service", "install")
    assert installed.returncode == 0, installed.stderr
    commands = dict(line.split(":", 1) for line in installed.stdout.splitlines() if ": " in line)
    systemd.run(commands["Start"])
    wait_until(is_healthy)
    statuses = json.loads(gptloop("service", "status", "--json").stdout)
    assert [each["state"] for each in statuses] == ["RUNNING"] * 4

    killed = pid("trainer")
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: pid("trainer") not in (0, killed))
    wait_until(is_healthy)

    run = _start_training(ports, directories)
    still = gptloop("service", "uninstall")
    assert still.returncode == 1 and f"trainer (pid {pid('trainer')})" in still.stderr
    refused = gptloop("up")
    assert refused.returncode == 1 and "gptloop service status" in refused.stderr

    systemd.run(commands["Stop"])
    assert not running_processes(directories)
    assert _has_last_state(directories, run)
    results = systemd.run("systemctl --user show --property Result 'gptloop-*'")
    assert set(results.split()) <= {"Result=success"}
    assert gptloop("service", "status").returncode == 3

    assert gptloop("service", "uninstall").returncode == 0
    assert not [path for path in (Path(systemd.environment["HOME"])).rglob("*gptloop*") if path.is_file()]


def test_the_agents_of_launchd_run_and_stop_in_their_time(
    agents: Agents, directories: Directories, ports: Ports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/launchctl").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    manager = manager_of(os.environ, "darwin")
    install(manager, read_installation(os.environ | ports.to_environment() | {"GPTLOOP_VAR": str(directories.var)}))

    agents.start()
    wait_until(lambda: all(each.is_healthy for each in service_statuses(manager)))
    run = _start_training(ports, directories)
    codes = agents.stop()
    assert set(codes.values()) == {0} and len(codes) == 4
    wait_until(lambda: not running_processes(directories))
    assert _has_last_state(directories, run)
    assert "page on http://" in (directories.log / "inference.log").read_text()
    assert not any(path.read_text() for path in directories.log.glob("*.out"))
    assert len(uninstall(manager)) == 4
