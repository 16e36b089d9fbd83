import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared.registry.faults import build, linux_only
from tests.shared.registry.scenarios import SCENARIOS

PROJECT = Path(__file__).parents[3]

pytestmark = [pytest.mark.slow, linux_only]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_registry_stays_valid_whichever_file_operation_fails_or_is_the_last(
    library: Path, tmp_path: Path, scenario: str
) -> None:
    command = [sys.executable, "-m", "tests.shared.registry.faulted", "sweep", str(library), str(tmp_path), scenario]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    once, from_then_on, dead = (line.split() for line in ended.stdout.splitlines())
    for hits in (once, from_then_on):
        assert {"open", "fsync", "unlink" if scenario in ("prune", "teachers-go") else "write"} <= set(hits)
        assert ({"ftruncate"} if scenario == "history" else {"mkdir", "rename"}) <= set(hits)
    # A dying process does not report the operation, but dies at as many of them.
    assert len(once) - 5 <= len(dead) <= len(once) + 5
