"""The project in a folder whose name shells, supervisord, MLX and Redis clients each misread in their own way."""

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.ports import Ports, free_ports
from inference_service.client import InferenceClient
from shared.errors import Unavailable
from shared.service.settings import Directories
from tests.end_to_end.conftest import PROJECT, TINY, share_kernels
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

NAME = """sp ace %(here)s %d " o'ne $HOME `x` ü 猫"""

Command = Callable[..., str]


@pytest.fixture
def ports() -> Ports:
    return free_ports()


@pytest.fixture
def command(tmp_path: Path, ports: Ports) -> Iterator[Command]:
    """Runs a command of a copy of the project in such a folder, whose state is in the `var` beside it."""
    project = tmp_path / NAME / "gptloop"
    for package in ("deploy", "inference_service", "shared", "trainer_service"):
        shutil.copytree(PROJECT / package, project / package)
    (project / "var").mkdir()
    # That compilers work with such paths too is tested in tests/shared/device/test_native.py.
    share_kernels(Directories(project / "var"))
    environment = {name: value for name, value in os.environ.items() if name not in ("REDIS_URL", "GPTLOOP_VAR")}
    environment |= ports.to_environment()

    def run(*arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=project,
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    yield run
    run("deploy.cli", "down")


def test_everything_runs_in_a_folder_with_any_name(command: Command, ports: Ports) -> None:
    page = f"http://127.0.0.1:{ports.inference_http}/"
    assert command("deploy.cli", "up").endswith(f"Everything is up.\nThe page: {page}\n")
    with urllib.request.urlopen(page, timeout=HANG_S) as answer:
        assert "<title>gptloop" in answer.read().decode()
    values = TINY | {"max_steps": "2", "evaluation_interval": "2", "max_train_tokens": "4000"}
    trained = command("trainer_service", "train", "--set", " ".join("=".join(value) for value in values.items()))
    assert "version 1" in trained
    with InferenceClient(f"127.0.0.1:{ports.inference}") as client:
        wait_until(lambda: _serves(client))
    assert command("inference_service", "generate", "--prompt", "Once", "--max-tokens", "5").strip()
    assert command("deploy.cli", "down") == "Everything is stopped.\n"


def _serves(client: InferenceClient) -> bool:
    try:
        return bool(client.model().version)
    except Unavailable:
        return False
