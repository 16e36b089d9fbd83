"""Two workers with a folder, a host name and devices of their own share a Redis and a registry, as on two machines."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from shared.registry.object_store import ObjectStore
from shared.service.settings import read_directories
from tests.nvidia import nvidia_machine
from tests.object_storage.server import MISSING, is_installed
from tests.redis_process import PROJECT, RedisServer
from tests.trainer_service.site import TINY_RUN, Site
from tests.waiting import wait_until
from trainer_service.jobs.events import JobState, Preparation
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import TrainRequest
from trainer_service.text.tokens import Stage

pytestmark = pytest.mark.slow


class Machine:
    """A machine with a worker; what it has of its own lies below a folder that is named after it."""

    def __init__(self, folder: Path, shared: Mapping[str, str], devices: Mapping[str, str]) -> None:
        self.var = folder / "var"
        self.var.mkdir(parents=True)
        # Kernels are compiled once.
        cache = PROJECT / ".pytest_cache" / "workers"
        cache.mkdir(parents=True, exist_ok=True)
        (self.var / "cache").symlink_to(cache)
        # Python runs this file first: the host name is the only thing that is not real.
        (folder / "sitecustomize.py").write_text(f"import socket\nsocket.gethostname = lambda: {folder.name!r}\n")
        search = os.pathsep.join(filter(None, [str(folder), devices.get("PYTHONPATH", "")]))
        self._environment = {**os.environ, **devices, **shared, "GPTLOOP_VAR": str(self.var)}
        self._environment["PYTHONPATH"] = search
        self._log = folder / "worker.log"
        self._worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "trainer_service", "work"],
                env=self._environment,
                cwd=PROJECT,
                stderr=log,
                stdout=log,
            )

    def lose_power(self) -> None:
        """Kills the worker, which first cannot notice the end of its processes, and these."""
        if self._worker:
            self._worker.send_signal(signal.SIGSTOP)
            listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
            for child in [
                int(row[0]) for row in map(str.split, listed.splitlines()) if int(row[1]) == self._worker.pid
            ]:
                os.kill(child, signal.SIGKILL)
            self._worker.kill()
            self._worker.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()


class Cluster:
    """Both machines, and what they share. One of them has a GPU, as far as its worker can see."""

    def __init__(self, folder: Path, redis: RedisServer, registry: Mapping[str, str]) -> None:
        shared = {**registry, "REDIS_URL": redis.url}
        self.registry = read_directories(shared | {"GPTLOOP_VAR": str(folder / "client")}).open_registry()
        self.queue = JobQueue(redis.connect(), self.registry.store.id())
        self.text = Site.write(folder / "text.txt", 0)
        self.small = Machine(folder / "small", shared, {})
        self.large = Machine(folder / "large", shared, nvidia_machine(folder / "devices", [81559]))

    def train(self, name: str, needs: str = "", **values: str) -> str:
        request = TrainRequest(name=name, dataset=(self.text,), needs=needs, overrides=TINY_RUN | values)
        return self.queue.enqueue(request.resolve(self.registry)).id

    def job(self, job: str) -> JobRecord:
        return self.queue.store.get(job)

    def wait_for(self, job: str, state: JobState) -> None:
        wait_until(lambda: self.job(job).state is state, lost=lambda: self.job(job).state is JobState.FAILED)

    def prepared(self, job: str) -> bool:
        """Whether a job has tokenised its text itself."""
        events = [timed.event for _, timed in self.queue.store.read_events(job)]
        return any(isinstance(each, Preparation) and each.stage == Stage.TRAIN for each in events)

    def step(self, job: str) -> int:
        progress = self.job(job).progress
        return progress.step if progress else 0


@pytest.fixture(params=["folder", "bucket"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path, mortal_redis: RedisServer) -> Iterator[Cluster]:
    registry = {"GPTLOOP_REGISTRY": str(tmp_path / "shared")}
    if request.param == "bucket":
        if not is_installed():
            pytest.skip(MISSING)
        registry = request.getfixturevalue("object_server").place().settings
        patch = request.getfixturevalue("monkeypatch")
        for name, value in registry.items():
            patch.setenv(name, value)
    cluster = Cluster(tmp_path, mortal_redis, registry)
    yield cluster
    cluster.small.lose_power()
    cluster.large.lose_power()


def test_each_machine_takes_the_jobs_that_it_has_enough_for(cluster: Cluster) -> None:
    on_gpu, anywhere = cluster.train("on-gpu", needs="gpu,memory=60G"), cluster.train("anywhere")
    cluster.small.start()
    cluster.wait_for(anywhere, JobState.FINISHED)
    assert cluster.job(on_gpu).awaited == "a worker with a GPU, 60.0 GiB of memory"
    cluster.large.start()
    cluster.wait_for(on_gpu, JobState.FINISHED)
    assert {each.run for each in cluster.registry.versions()} == {"on-gpu", "anywhere"}
    # Each has the tokens in its own folder; only from a bucket it can get what the other one has prepared.
    for machine in (cluster.small, cluster.large):
        assert list((machine.var / "data" / "shards").glob("*/train.bin"))
    is_shared = isinstance(cluster.registry.store, ObjectStore)
    assert cluster.prepared(anywhere) and cluster.prepared(on_gpu) is not is_shared


def test_a_job_goes_on_elsewhere_when_its_machine_is_gone(cluster: Cluster) -> None:
    job = cluster.train("moves", max_steps="1000000", warmup_steps="1")
    cluster.small.start()
    wait_until(lambda: cluster.registry.states("moves") != [])
    cluster.large.start()
    wait_until(lambda: cluster.queue.store.workers.count() == 2)
    cluster.small.lose_power()
    wait_until(lambda: cluster.job(job).attempt == 2 and cluster.job(job).is_held)
    started = cluster.step(job)
    wait_until(lambda: cluster.step(job) > started)
    assert f"job {job}: attempt 1 is given up" in cluster.large.log
    cluster.queue.cancel(job)
    cluster.wait_for(job, JobState.CANCELLED)
    assert cluster.job(job).attempt == 2
    assert cluster.registry.states("moves")[-1] >= started
