"""The script for Slurm, with a program in the place of srun."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.service.listening import free_port_numbers
from tests.trainer_service.ranks.workplace import ENDLESS, Workplace
from tests.waiting import HANG_S, wait_until
from tests.workplace import PROJECT
from trainer_service.jobs.events import JobState

SCRIPT = PROJECT / "deploy/slurm/train.sbatch"
# Says how it was called, and does as its caller says: `$folder/code` has the codes of its calls, one a line.
_SRUN = """#!/bin/bash
echo "$*" >> "$folder/calls"
code=$(head -n 1 "$folder/codes")
sed -i 1d "$folder/codes"
if [ "$code" = wait ]; then
    trap 'exit 75' TERM
    touch "$folder/waits"
    while :; do read -r -t 1 < "$folder/silence" || true; done
fi
exit "$code"
"""
# Starts two tasks on this machine, and passes signals on.
_TWO_TASKS = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
shift
tasks=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NTASKS=2 SLURM_LOCALID=$task SLURM_JOB_NODELIST=localhost "$PYTHON" "$@" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done
done
exit "$code"
"""


class Slurm:
    """Runs the script, whose calls of srun end with these codes; `wait` waits for SIGTERM."""

    def __init__(self, folder: Path, *codes: str) -> None:
        self._folder = folder
        (folder / "srun").write_text(_SRUN)
        (folder / "srun").chmod(0o755)
        (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        os.mkfifo(folder / "silence")

    def start(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{self._folder}:/usr/bin:/bin", "folder": str(self._folder), **variables}
        return subprocess.Popen(
            ["bash", SCRIPT, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def calls(self) -> list[str]:
        return (self._folder / "calls").read_text().splitlines()


def _ended(script: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = script.communicate(timeout=HANG_S)
    return script.returncode, said


@pytest.mark.slow
def test_ranks_that_end_too_early_start_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "75", "137", "0")
    code, said = _ended(slurm.start("0916c9dc", REDIS_URL="redis://queue"))
    assert code == 0, said
    assert slurm.calls() == ["--mpi=none --kill-on-bad-exit=1 .venv/bin/python -m trainer_service rank 0916c9dc"] * 3


@pytest.mark.slow
def test_the_script_gives_up_after_five_starts(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, *["75"] * 9)
    assert _ended(slurm.start("0916c9dc", REDIS_URL="redis://queue"))[0] == 1
    assert len(slurm.calls()) == 5


@pytest.mark.slow
def test_the_end_of_the_time_is_passed_on_and_nothing_starts_again(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, "wait", "0")
    script = slurm.start("0916c9dc", REDIS_URL="redis://queue")
    wait_until(lambda: (tmp_path / "waits").exists())
    script.send_signal(signal.SIGTERM)
    code, said = _ended(script)
    assert code == 75, said
    assert "The time is over" in said and len(slurm.calls()) == 1


@pytest.mark.slow
def test_the_end_of_the_time_returns_a_run_with_its_last_step(tmp_path: Path) -> None:
    work = Workplace(tmp_path)
    try:
        job = work.enqueue(**ENDLESS)
        (tmp_path / "srun").write_text(_TWO_TASKS)
        (tmp_path / "srun").chmod(0o755)
        script = subprocess.Popen(
            ["bash", SCRIPT, job],
            cwd=PROJECT,
            env=work.environment
            | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
            | {"GPTLOOP_RANK_PORT": str(free_port_numbers(2)[0])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        work.wait_for_steps(job)
        script.send_signal(signal.SIGTERM)
        code, said = _ended(script)
        assert (code, said.count("Start ")) == (75, 1), said
        record = work.record(job)
        assert (record.state, record.attempt) == (JobState.QUEUED, 2), said
        work.cancel_all()
    finally:
        work.redis.end()


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [((), {"REDIS_URL": "redis://queue"}, "Name the job"), (("0916c9dc",), {}, "REDIS_URL is not set")],
)
def test_what_is_missing_is_named(
    tmp_path: Path, words: tuple[str, ...], variables: dict[str, str], sentence: str
) -> None:
    code, said = _ended(Slurm(tmp_path).start(*words, **variables))
    assert code == 2 and sentence in said
