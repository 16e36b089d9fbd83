"""A folder in which a real worker does jobs with a large teacher."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.conftest import children
from tests.groq_service import GroqService
from tests.redis_process import PROJECT, RedisServer
from tests.registries import registry_id
from tests.waiting import wait_until
from trainer_service.distillation.ledger import Account, read_account, stories_folder
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.specs import StoriesSpec


class Workplace:
    """A folder, a Redis, and at most one worker that takes the jobs of its registry."""

    def __init__(self, var: Path, redis: RedisServer, service: GroqService) -> None:
        self.queue = JobQueue(redis.connect(), registry_id(var / "registry"))
        self.folder = stories_folder(var / "data", "s")
        self._log = var / "worker.log"
        own = {"GPTLOOP_VAR": str(var), "REDIS_URL": redis.url}
        others = {name: value for name, value in os.environ.items() if not name.startswith(("GROQ_", "GPTLOOP_"))}
        self.environment = others | service.environment | own
        self.worker: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts a worker."""
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "trainer_service", "work"]
            self.worker = subprocess.Popen(command, cwd=PROJECT, env=self.environment, stderr=log)

    def end(self, number: int = signal.SIGKILL) -> None:
        """Ends the worker by a signal, and waits for its end."""
        if self.worker:
            self.worker.send_signal(number)
            self.worker.wait()

    def process(self) -> int | None:
        """Returns the pid of the process of the job that runs now."""
        assert self.worker
        return next(iter(children(self.worker.pid)), None)

    def enqueue(self, count: int, max_cost_usd: float, name: str = "s") -> str:
        """Queues a job."""
        return self.queue.enqueue(StoriesSpec(name, count, max_cost_usd)).id

    def wait(self, job: str) -> JobRecord:
        """Returns a job when it has ended."""
        wait_until(lambda: self.queue.store.get(job).state.is_final)
        return self.queue.store.get(job)

    @property
    def account(self) -> Account:
        """What the set has cost so far."""
        return read_account(self.folder)

    @property
    def log(self) -> str:
        """What the workers have logged."""
        return self._log.read_text()
