"""Ctrl-C while the modules of a command load, for every module that people run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_S

PROJECT = Path(__file__).parents[3]
# Runs a module with arguments, and interrupts the process when it imports a given module.
RUN_AND_INTERRUPT = """
import os, runpy, signal, sys

(module, *words), interrupted = sys.argv[1].split(), sys.argv[2]


class Interruption:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)


sys.meta_path.insert(0, Interruption())
sys.argv = [module, *words, "--help"]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("command", "imported"),
    [
        *((module, imported) for module in ("trainer_service", "inference_service") for imported in ("typer", "rich")),
        ("trainer_service", "redis"),
        ("deploy.cli", "typer"),
        ("deploy.cli up", "grpc"),
        ("deploy.cli demo", "grpc"),
        ("deploy.make", "typer"),
    ],
)
def test_ctrl_c_while_modules_load_ends_the_command_quietly(command: str, imported: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_INTERRUPT, command, imported],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
