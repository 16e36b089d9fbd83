"""A registry, a Redis and workers in which the tests train with several ranks: real processes and real signals."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from shared.errors import FailedPrecondition
from shared.gpt.weights import load_arrays
from shared.service.settings import Directories
from shared.version_format import MODEL_FILE, OPTIMIZER_FILE
from tests.end_to_end.conftest import PROJECT, children, is_gone
from tests.redis_process import RedisServer
from tests.trainer_service.site import TINY_RUN, Site
from tests.waiting import wait_until
from trainer_service.jobs.events import Event, JobState, Progress, RunStarted, StateChanged
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import TrainRequest

Told = TypeVar("Told", bound=Event)

# Ends by itself only after hours.
ENDLESS = {"max_steps": "1000000", "evaluation_interval": "20"}


class Workplace:
    """Jobs of one registry. Compiled kernels outlive it, so that no test waits for a compiler twice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directories = Directories(folder / "var")
        self.directories.var.mkdir()
        kernels = PROJECT / ".pytest_cache" / "ranks"
        kernels.mkdir(parents=True, exist_ok=True)
        self.directories.cache.symlink_to(kernels)
        self.registry = self.directories.open_registry()
        self.text = Site.write(folder / "text.txt", 0)
        self.redis = RedisServer(folder)
        self.queue = JobQueue(self.redis.connect(), self.registry.store.id())
        self.environment = os.environ | {"GPTLOOP_VAR": str(self.directories.var), "REDIS_URL": self.redis.url}

    def enqueue(self, **values: str) -> str:
        """Queues a run of two ranks."""
        return self._put(self._request(**values))

    def enqueue_until(self, step: int) -> str:
        """Queues such a run, which waits at a step."""
        return self._put(self._request(), step)

    def _request(self, **values: str) -> TrainRequest:
        return TrainRequest(dataset=(self.text,), overrides=TINY_RUN | {"world_size": "2"} | values)

    def resume(self, version: int, **values: str) -> str:
        """Queues a run that continues a version."""
        return self._put(TrainRequest(resume=version, overrides=values))

    def _put(self, request: TrainRequest, until: int | None = None) -> str:
        return self.queue.enqueue(replace(request.resolve(self.registry), until=until)).id

    @contextmanager
    def worker(self, log: str = "worker.log", **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Runs a worker with more settings, and kills it in the end, which ends its ranks."""
        process = self.start("work", log=log, **{"GPTLOOP_WORKER_RANKS": "4"} | settings)
        try:
            yield process
        finally:
            self.cancel_all()
            processes = descendants(process.pid)
            process.kill()
            process.wait()
            wait_until(lambda: all(map(is_gone, processes)))

    def cancel_all(self) -> None:
        """Cancels the jobs that have not ended, so that the next worker takes none of them."""
        for record in self.queue.store.open_jobs():
            with suppress(FailedPrecondition):
                self.queue.cancel(record.id)

    def start(self, *arguments: str, log: str, **settings: str) -> subprocess.Popen[bytes]:
        """Starts a command of the trainer, whose output goes to a file."""
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "trainer_service", *arguments],
                cwd=PROJECT,
                env=self.environment | settings,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def log(self, name: str = "worker.log") -> str:
        return (self.folder / name).read_text()

    def record(self, job: str) -> JobRecord:
        return self.queue.store.get(job)

    def wait_for_steps(self, job: str, attempt: int = 1, saved: bool = True) -> None:
        """Waits until an attempt has taken steps and, if asked, the run has a state."""

        def has_stepped() -> bool:
            record = self.record(job)
            assert record.spec is not None
            events = self.all_events(job)
            began = [number for number, event in enumerate(events) if event == StateChanged(JobState.RUNNING)]
            steps = [event for event in events[began[-1] :] if isinstance(event, Progress)] if began else []
            is_kept = not saved or bool(self.registry.states(record.spec.run))
            return len(began) == attempt and len(steps) > 1 and is_kept

        wait_until(has_stepped, lambda: self.record(job).attempt > attempt or self.record(job).state.is_final)

    def end(self, job: str) -> JobRecord:
        """Returns the record of a job once it has ended."""
        wait_until(lambda: self.record(job).state.is_final)
        return self.record(job)

    def all_events(self, job: str) -> list[Event]:
        events, last = list[Event](), "0"
        while found := self.queue.store.read_events(job, last):
            events += [timed.event for _, timed in found]
            last = found[-1][0]
        return events

    def events(self, job: str, kind: type[Told]) -> list[Told]:
        return [event for event in self.all_events(job) if isinstance(event, kind)]

    def last_state(self, job: str) -> dict[str, np.ndarray]:
        """Returns the weights and the moments of the last state of a job's run."""
        spec = self.record(job).spec
        assert spec is not None
        folder = self.registry.verified_state(spec.run, self.registry.states(spec.run)[-1])
        files = (MODEL_FILE, OPTIMIZER_FILE)
        return {
            f"{file}/{name}": np.array(array) for file in files for name, array in load_arrays(folder / file).items()
        }

    def reasons(self, job: str) -> list[str]:
        """Returns why the attempts of a job ended, except the last one."""
        changes = self.events(job, StateChanged)
        return [change.reason for change in changes if change.state is JobState.QUEUED and change.reason]

    def first_steps(self, job: str) -> list[int]:
        return [event.first_step for event in self.events(job, RunStarted)]


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process has started, and those that they have started."""
    return [each for child in children(pid) for each in (child, *descendants(child))]


def ranks_of(worker: int, count: int = 2) -> list[int]:
    """Returns the pids of the ranks that a worker has started, in their order."""
    found: Sequence[tuple[int, int]] = ()

    def look() -> bool:
        nonlocal found
        found = sorted((rank, pid) for pid in descendants(worker) if (rank := _rank(pid)) is not None)
        return len(found) == count

    wait_until(look)
    return [pid for _, pid in found]


def _rank(pid: int) -> int | None:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    found = re.search(rb"(?:^|\0)(?:JOB_COMPLETION_INDEX|OMPI_COMM_WORLD_RANK|MLX_RANK)=(\d+)\0", environment)
    return int(found[1]) if found and b"rank" in command else None
