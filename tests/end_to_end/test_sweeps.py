"""Sweeps as a person starts them: real commands, a real Redis and real workers, which are killed."""

import json
import os
import signal
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import TINY, System, is_gone
from tests.waiting import HANG_S, wait_until
from tests.workplace import Workplace
from trainer_service.jobs.records import JobRecord
from trainer_service.text.stories import train_stories

pytestmark = pytest.mark.slow

VALUES = {**TINY, "context_length": "64", "dropout": "0.1", "max_steps": "80", "evaluation_interval": "20"}
SET = " ".join(f"{name}={value}" for name, value in VALUES.items())
TRIED = "learning_rate=1e-3,1e-2 weight_decay=0.1,0.3"


@pytest.fixture(scope="module")
def workplace(system: System, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    workplace = Workplace(tmp_path_factory.mktemp("a folder"), system.environment)
    text = "<|endoftext|>".join(islice(train_stories(), 400))
    (workplace.folder / "stories.txt").write_text(text)
    return workplace


def command(name: str, tried: str = TRIED) -> list[str]:
    words = ["--dataset", "stories.txt", "--set", SET, "--name", name, "--rungs", "3", "--keep", "1/2", "--json"]
    return [".venv/bin/gptloop", "sweep", "--try", tried, *words]


def at_rest(job: JobRecord) -> bool:
    return job.is_suspended or job.state.is_final


def begun(workplace: Workplace, name: str) -> subprocess.Popen[str]:
    """Starts the command; what it says comes through a pipe."""
    return subprocess.Popen(
        command(name),
        cwd=workplace.folder,
        env=workplace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def table(printed: str) -> list[dict[str, Any]]:
    """Returns the rows without what differs between two sweeps alike."""
    own = ("training_seconds", "version", "run", "job")
    return [{name: value for name, value in row.items() if name not in own} for row in json.loads(printed)]


def candidates(system: System, name: str) -> dict[int, JobRecord]:
    """Returns the jobs of a sweep by the numbers of its candidates."""
    found = {job.spec.run: job for job in system.queue.store.jobs() if job.spec}
    return {number: found[f"{name}-{number}"] for number in range(1, 5) if f"{name}-{number}" in found}


@pytest.fixture(scope="module")
def whole(system: System, workplace: Workplace) -> list[dict[str, Any]]:
    """The table of a sweep that nothing disturbed."""
    ended = workplace.run(*command("whole"))
    assert ended.returncode == 0, ended
    return table(ended.stdout)


def test_the_best_candidate_trains_to_the_end_and_others_have_no_further_steps(
    system: System, workplace: Workplace, whole: list[dict[str, Any]]
) -> None:
    assert [row["state"] for row in whole] == ["finished", "stopped", "stopped", "stopped"]
    assert [row["steps"] for row in whole] == [80, 40, 20, 20]
    losses = [row["loss_at_step_20"] for row in whole]
    assert max(losses[:2]) <= min(losses[2:]) and whole[0]["loss_at_step_40"] <= whole[1]["loss_at_step_40"]
    for row in whole:
        run = f"whole-{row['candidate']}"
        assert system.registry.states(run)[-1:] == [row["steps"]] and system.registry.has_ended(run)
        assert [each.step for each in system.registry.histories.read(run).evaluations][-1] == row["steps"]
    best = system.registry.resolve(f"run:whole-{whole[0]['candidate']}")
    page = Path(system.directories.reports / "sweep-whole.html").read_text()
    assert page.count("<li>") == 4 and "Sweep whole" in page
    # The same command prints the same, and queues nothing.
    before = {job.id for job in system.queue.store.jobs()}
    again = workplace.run(*command("whole"))
    assert table(again.stdout) == whole and {job.id for job in system.queue.store.jobs()} == before
    assert f"Serve its best version: gptloop pin {best.version}" in again.stderr
    assert "Train with its values:  gptloop train --dataset " in again.stderr


def test_a_sweep_that_is_killed_with_its_worker_goes_on_to_the_same_table(
    system: System, workplace: Workplace, whole: list[dict[str, Any]]
) -> None:
    with begun(workplace, "killed") as interrupted:
        wait_until(lambda: any(job.is_suspended for job in candidates(system, "killed").values()))
        interrupted.send_signal(signal.SIGINT)
        _, told = interrupted.communicate(timeout=HANG_S)
        assert interrupted.returncode == 130
        assert "The candidates train on to their next rung. Give the same command with --name killed" in told
    with begun(workplace, "killed") as killed:
        wait_until(lambda: sum(bool(job.evaluation) for job in candidates(system, "killed").values()) >= 2)
        killed.kill()
        worker = system.pid("worker")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: is_gone(worker))
        killed.communicate(timeout=HANG_S)
        assert killed.returncode == -signal.SIGKILL
    # Candidates go on to their rung while the command is away, and nothing is decided.
    wait_until(lambda: all(at_rest(job) for job in candidates(system, "killed").values()))
    # The command decides once, and prints the table of an unfinished sweep.
    ended = workplace.run(*command("killed"), "--no-follow")
    assert ended.returncode == 0 and "The sweep is not over." in ended.stderr
    losses = sorted(row["loss_at_step_20"] for row in table(ended.stdout))
    assert losses == sorted(row["loss_at_step_20"] for row in whole)
    ended = workplace.run(*command("killed"))
    assert ended.returncode == 0, ended
    assert table(ended.stdout) == whole
    assert "4 of the candidates were queued before, so the sweep goes on." in ended.stderr
