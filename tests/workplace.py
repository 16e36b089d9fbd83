"""A folder like a fresh checkout, in which make runs real commands."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.waiting import HANG_S

PROJECT = Path(__file__).parents[1]


class Workplace:
    """A checkout with the virtual environment of the tests and without any state.

    environment: more environment variables for its commands.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        # Without the settings of the person who runs the tests, and without the variables of a make that started them.
        own = ("GPTLOOP_", "REDIS_URL")
        seen = {name: value for name, value in os.environ.items() if not name.startswith(own)} | dict(environment or {})
        self.environment = {name: value for name, value in seen.items() if not name.startswith("MAKE")}
        packages = ("shared", "deploy", "trainer_service", "inference_service", "tests")
        for name in ("Makefile", "pyproject.toml", "requirements", *packages):
            (folder / name).symlink_to(PROJECT / name)
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/installed-cpu").touch()
        python = shlex.quote(sys.executable)
        self._write_script("python", f'exec {python} "$@"')
        self._write_script("gptloop", f'PYTHONPATH={shlex.quote(str(folder))} exec {python} -P -m deploy.cli "$@"')

    def _write_script(self, name: str, line: str) -> None:
        script = self.folder / ".venv/bin" / name
        script.write_text(f"#!/bin/sh\n{line}\n")
        script.chmod(0o755)

    def run(self, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a program in the folder."""
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )

    def make(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs make in the folder."""
        return self.run("make", *words, **environment)

    def refusal(self, *words: str, **environment: str) -> str:
        """Runs make, and returns the one sentence with which it fails."""
        ended = self.make(*words, **environment)
        assert ended.returncode == 2, ended
        error, *rest = ended.stderr.splitlines()
        assert all(line.startswith("make: ***") for line in rest), ended.stderr
        assert len(error) <= 310
        return error
