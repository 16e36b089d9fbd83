"""Kills the processes of a run at random moments, and compares its end with an uninterrupted run, bit for bit.

`python -m tests.soak.kills --kills 30`
"""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from shared.errors import GptloopError, Unavailable
from shared.service import cli
from shared.service.lists import print_rows
from shared.service.settings import Directories
from shared.text import format_duration
from tests.end_to_end.conftest import Result, System, children, running
from trainer_service.jobs.events import JobState
from trainer_service.jobs.records import JobRecord

_STEPS_PER_KILL = 100
_VALUES = {"context_length": "64", "dropout": "0.1", "evaluation_interval": "25"}
_STALLED_S = 180.0
_POLL_S = 0.05
# This share of the kills follows the previous kill directly, within at most this time.
_AGAIN_SHARE = 0.25
_AGAIN_S = 4.0

_PROGRAMS = ("redis", "trainer", "inference", "worker")

# Returns the processes to kill.
Target = Callable[[System, random.Random], list[int]]


def programs(*names: str) -> Target:
    """Returns the target of these programs; one that is being restarted has no pid."""

    def pids(system: System, _: random.Random) -> list[int]:
        found = []
        for name in names:
            with suppress(AssertionError):
                found.append(system.pid(name))
        return found

    return pids


def with_training(*names: str) -> Target:
    """Returns the target of these programs and of what the worker has started."""

    def pids(system: System, numbers: random.Random) -> list[int]:
        workers = programs("worker")(system, numbers)
        return programs(*names)(system, numbers) + [pid for worker in workers for pid in children(worker)]

    return pids


TARGETS: dict[str, Target] = {
    "training process": with_training(),
    "worker": programs("worker"),
    "worker and training process": with_training("worker"),
    "Redis": programs("redis"),
    "trainer API": programs("trainer"),
    "inference": programs("inference"),
    "everything but the supervisor": with_training(*_PROGRAMS),
}


class Violation(Exception):
    """A guarantee was broken."""


@dataclass
class Kill:
    """A kill: its target, the step and time of it, and the time until the run got beyond that step."""

    target: str
    step: int
    at_s: float
    recovered_s: float | None = None


class Soak:
    """A run whose processes are killed at random steps."""

    def __init__(
        self,
        system: System,
        kills: int,
        seed: int,
        targets: Mapping[str, Target] = TARGETS,
        steps_per_kill: int = _STEPS_PER_KILL,
        **values: str,
    ) -> None:
        self._system = system
        self._choices = targets
        self._values = values
        self._random = random.Random(seed)
        self._count = kills
        steps = kills * steps_per_kill
        self._max_steps = steps
        # No kill happens in the last tenth, so that the run can recover from the last one.
        self._planned = sorted(self._random.randrange(1, steps * 9 // 10) for _ in range(kills))
        # All targets are about equally frequent.
        self._targets = (list(targets) * kills)[:kills]
        self._random.shuffle(self._targets)
        self.kills: list[Kill] = []

    def train(self) -> str:
        """Enqueues the run."""
        return self._system.enqueue(None, **_VALUES | {"max_steps": str(self._max_steps)} | self._values)

    def kill(self, job: str) -> None:
        """Kills until there were enough kills; raises `Violation` if the job ends or makes no progress."""
        began_s = time.monotonic()
        while len(self.kills) < self._count:
            again = bool(self.kills) and self._random.random() < _AGAIN_SHARE
            if again:
                time.sleep(self._random.uniform(0.0, _AGAIN_S))
            else:
                self._wait(job, self._planned[len(self.kills)])
            self._strike(job)
            left_s = (time.monotonic() - began_s) / len(self.kills) * (self._count - len(self.kills))
            print(
                f"kill {len(self.kills)} of {self._count} at step {self.kills[-1].step} of {self._max_steps}: "
                f"{self.kills[-1].target}; about {format_duration(left_s)} left",
                flush=True,
            )
        self._wait(job, 0)

    def _wait(self, job: str, step: int) -> None:
        """Waits until the run has reached a step and is beyond the step of the last kill, or at its end."""
        beyond = min(max(step, self.kills[-1].step + 1 if self.kills else 1), self._max_steps)
        reached, changed_s = 0, time.monotonic()
        while reached < beyond:
            if time.monotonic() - changed_s > _STALLED_S:
                raise Violation(f"The run has been at step {reached} for {_STALLED_S:.0f} s.")
            time.sleep(_POLL_S)
            record = self.record(job)
            if record is None:
                continue
            now = record.progress.step if record.progress else 0
            if record.state.is_final and now < beyond:
                raise Violation(f"The job is {record.state.value} before its last step: {record.reason}")
            if now != reached:
                reached, changed_s = now, time.monotonic()
            for kill in self.kills:
                if kill.recovered_s is None and now > kill.step:
                    kill.recovered_s = time.monotonic() - kill.at_s

    def _strike(self, job: str) -> None:
        target = self._targets[len(self.kills)]
        record = self.record(job)
        step = record.progress.step if record and record.progress else self.kills[-1].step if self.kills else 0
        pids = self._choices[target](self._system, self._random)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kills.append(Kill(target, step, time.monotonic()))

    def record(self, job: str) -> JobRecord | None:
        """Returns the current record of the job, or None while Redis cannot be reached."""
        with suppress(Unavailable):
            return self._system.queue.store.get(job)
        return None

    def print_summary(self) -> None:
        """Prints the kills of each target, and the times until the run got beyond the step of the kill."""
        rows = []
        for target in self._choices:
            kills = [kill for kill in self.kills if kill.target == target]
            times_s = [kill.recovered_s for kill in kills if kill.recovered_s is not None]
            figures = [f"{median(times_s):.1f} s", f"{max(times_s):.1f} s"] if times_s else ["", ""]
            rows.append((target, str(len(kills)), *figures))
        print_rows(("killed", "times", "median recovery", "longest recovery"), rows)


def check(system: System, job: str, reference: Result) -> list[str]:
    """Returns every difference between the end of the run and that of the uninterrupted one."""
    violations = []
    result = system.result(job)
    if result.last_step != reference.last_step or result.state != reference.state:
        violations.append("The last state differs from the uninterrupted run's.")
    for step in sorted(result.weights.keys() & reference.weights.keys()):
        if result.weights[step] != reference.weights[step]:
            violations.append(f"The weights of the version of step {step} differ from the uninterrupted run's.")
    return violations + damages(system, result, reference)


def damages(system: System, result: Result, reference: Result) -> list[str]:
    """Returns what is missing or damaged in the registry."""
    violations = []
    if reference.last_step not in result.weights:
        violations.append("There is no version of the last step.")
    registry = system.registry
    for checkpoint in registry.checkpoints():
        try:
            registry.check(checkpoint)
        except GptloopError as error:
            violations.append(f"{checkpoint} is damaged: {error}")
    return violations + [f"{path} is not a checkpoint." for path in registry.store.unknown()]


def soak(
    kills: int,
    seed: int | None,
    find: Callable[[System, str, Result], list[str]] = check,
    targets: Mapping[str, Target] = TARGETS,
    steps_per_kill: int = _STEPS_PER_KILL,
    **values: str,
) -> list[str]:
    """Trains a run with these values twice, the second time with kills, and returns the violations, which `find` finds
    at the end."""
    seed = random.SystemRandom().randrange(1000) if seed is None else seed
    var = Path(tempfile.mkdtemp(prefix="gptloop-soak-"))
    print(f"seed {seed}, files in {var}", flush=True)
    with running(Directories(var)) as system:
        run = Soak(system, kills, seed, targets, steps_per_kill, **values)
        began_s = time.monotonic()
        uninterrupted = run.train()
        system.end(uninterrupted, hang_s=3600.0)
        reference = system.result(uninterrupted)
        reference_s = time.monotonic() - began_s
        print(f"uninterrupted: {reference.last_step} steps in {format_duration(reference_s)}", flush=True)
        began_s = time.monotonic()
        job = run.train()
        violations = []
        try:
            run.kill(job)
            ended = system.end(job, hang_s=3600.0)
            if system.queue.store.get(job).state is not JobState.FINISHED:
                violations.append(f"The job has not finished: {ended.reason}")
            violations += find(system, job, reference)
        except Violation as violation:
            violations.append(str(violation))
        run.print_summary()
        print(f"{format_duration(time.monotonic() - began_s)}, {system.queue.store.get(job).attempt} attempts")
    for text in violations:
        print(f"violation: {text}")
    if not violations:
        shutil.rmtree(var)
    return violations


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(help=__doc__)
def main(
    kills: Annotated[int, typer.Option(min=1, help="The number of kills.")] = 30,
    seed: Annotated[int | None, typer.Option(help="Seed of the targets and the steps; random by default.")] = None,
) -> None:
    if soak(kills, seed):
        raise typer.Exit(1)
    print("The end of the run equals that of the uninterrupted run, bit for bit.")


if __name__ == "__main__":
    cli.run(app)
