"""The whole system as its users run it: real processes, a real Redis, real signals."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from deploy.access import own_credentials
from deploy.launch import holder
from deploy.ports import Ports, free_ports
from deploy.stack import Stack
from inference_service.client import InferenceClient
from shared.errors import GptloopError
from shared.gpt.weights import load_arrays
from shared.pb.training.v1 import training_pb2 as pb
from shared.registry.registry import Registry
from shared.service.access.credentials import Credentials
from shared.service.settings import Directories
from tests.waiting import HANG_S, wait_until
from trainer_service.client import TrainerClient
from trainer_service.jobs.events import TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.redis_client import connect, read_redis

PROJECT = Path(__file__).parents[2]
# A step takes some hundredths of a second, and the context is long enough for streams that outlast a swap.
TINY = {
    "vocabulary_size": "400",
    "layers": "1",
    "width": "32",
    "heads": "2",
    "hidden_width": "64",
    "context_length": "256",
    "batch_size": "2",
    "max_train_tokens": "40000",
    "evaluation_windows": "4",
    "report_interval": "5",
    "warmup_steps": "1",
}
_FINAL = (pb.JOB_STATE_FINISHED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


@dataclass(frozen=True)
class Result:
    """The result of a run as bytes, to compare two runs bit for bit: the weights of the version of each step, and all
    arrays of the last state."""

    weights: dict[int, dict[str, bytes]]
    last_step: int
    state: dict[str, bytes]


@dataclass
class System:
    """Everything that runs, and ways to talk to it."""

    stack: Stack
    ports: Ports
    directories: Directories
    environment: dict[str, str]
    credentials: Credentials = field(init=False)
    trainer: TrainerClient = field(init=False)
    redis: Redis = field(init=False)
    queue: JobQueue = field(init=False)

    def __post_init__(self) -> None:
        self.credentials = own_credentials(self.environment)
        self.trainer = TrainerClient(f"127.0.0.1:{self.ports.trainer}", credentials=self.credentials)
        self.redis = connect(read_redis(self.environment, self.directories))
        self.queue = JobQueue(self.redis, self.registry.store.id())

    @property
    def registry(self) -> Registry:
        return self.directories.open_registry()

    def client(self) -> InferenceClient:
        return InferenceClient(f"127.0.0.1:{self.ports.inference}", credentials=self.credentials)

    def enqueue(self, resume: int | None = None, **values: str) -> str:
        overrides = (TINY if resume is None else {}) | values
        response = self.trainer.submit(TrainRequest(overrides=overrides, resume=resume))
        assert response.live_workers >= 1
        return response.job.id

    def watch(self, job: str, until: Callable[[pb.WatchJobResponse], bool]) -> list[pb.WatchJobResponse]:
        """Returns the events of a job up to the first that matches; fails if the job ends before."""
        events = []
        for event in self.trainer.watch(job, timeout_s=HANG_S):
            events.append(event)
            if until(event):
                return events
        raise AssertionError(f"The job ended before: {events[-3:]}")

    def finish(self, job: str) -> list[pb.WatchJobResponse]:
        return self.watch(job, lambda event: event.state_changed.state == pb.JOB_STATE_FINISHED)

    def end(self, job: str, hang_s: float = HANG_S) -> pb.Job:
        """Returns the job after it has ended in any way, even if processes were down before."""
        found = pb.Job()

        def ended() -> bool:
            with suppress(GptloopError):  # the supervisor is starting Redis or the API again
                found.CopyFrom(self.trainer.job(job))
            return found.state in _FINAL

        wait_until(ended, hang_s=hang_s)
        return found

    def events(self, job: str) -> list[TimedEvent]:
        """Returns all events of a job in Redis, also after its end."""
        events, last = [], "0"
        while found := self.queue.store.read_events(job, last):
            events += [timed for _, timed in found]
            last = found[-1][0]
        return events

    def step(self, job: str) -> int:
        """Returns the last step that a job reported."""
        progress = self.queue.store.get(job).progress
        return progress.step if progress else 0

    def advance(self, job: str, steps: int) -> None:
        """Waits until a job has reported more than `steps` further steps; fails if it ends first."""
        begun = self.step(job)

        def has_advanced() -> bool:
            record = self.queue.store.get(job)
            assert record.ended_at is None, f"The job {record.state.value}: {record.reason}"
            return self.step(job) > begun + steps

        wait_until(has_advanced)

    def run(self, job: str) -> str:
        spec = self.queue.store.get(job).spec
        assert spec is not None
        return spec.run

    def result(self, job: str) -> Result:
        registry, run = self.registry, self.run(job)
        versions = [version for version in registry.versions() if version.run == run]
        steps = [version.step for version in versions]
        assert len(steps) == len(set(steps)), f"A step has two versions: {steps}"
        last_step = registry.states(run)[-1]
        state = registry.verified_state(run, last_step)
        return Result(
            {version.step: _bytes(registry.fetch(version) / "model.safetensors") for version in versions},
            last_step,
            _bytes(state / "model.safetensors") | _bytes(state / "optimizer.safetensors"),
        )

    def pid(self, name: str) -> int:
        """Returns the pid of the supervisor or of one of its programs."""
        pid = holder(self.directories.var / "run" / f"{name}.lock")
        assert pid is not None
        return pid

    def training_process(self) -> int:
        (process,) = children(self.pid("worker"))
        return process

    def scrape(self, port: int) -> tuple[str, dict[str, float]]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as page:
            text = page.read().decode()
        samples = {
            " ".join([sample.name, *(value for name, value in sample.labels.items() if name in ("kind", "state"))]): (
                sample.value
            )
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        return text, samples

    def command(
        self, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command with the settings of the system, or others."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=PROJECT,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )


def share_kernels(directories: Directories) -> None:
    """Lets compiled kernels outlive the run, as those of the other tests do."""
    kernels = PROJECT / ".pytest_cache" / "system"
    kernels.mkdir(parents=True, exist_ok=True)
    directories.cache.symlink_to(kernels)


@contextmanager
def running(directories: Directories, **settings: str) -> Iterator[System]:
    """Starts the system with some settings, yields it once all of it is healthy, and stops it at the end."""
    share_kernels(directories)
    ports = free_ports()
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"} | settings
    stack = Stack(directories, ports, environment, worker_stop_s=20)
    stack.up(lambda _: None)
    everything = System(
        stack, ports, directories, environment | ports.to_environment() | {"GPTLOOP_VAR": str(directories.var)}
    )
    try:
        yield everything
    finally:
        everything.trainer.close()
        everything.redis.close()
        stack.down()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(Directories(tmp_path_factory.mktemp("system"))) as everything:
        yield everything


def is_progress(step: int) -> Callable[[pb.WatchJobResponse], bool]:
    return lambda event: bool(event.progress.step >= step)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def is_gone(pid: int) -> bool:
    """Returns whether a process has ended, even if its exit code has not been read yet."""
    found = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip()[:1] in ("", "Z")


def _bytes(path: Path) -> dict[str, bytes]:
    return {f"{path.stem}/{name}": np.array(array).tobytes() for name, array in load_arrays(path).items()}
