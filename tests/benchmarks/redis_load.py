"""Measures what workers, jobs, watching clients and calls ask of Redis and of the trainer (deploy/scale.md).

`python -m tests.benchmarks.redis_load` starts everything in a folder of its own; it takes about two minutes.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from deploy.ports import free_ports
from deploy.stack import Stack
from shared.errors import GptloopError
from shared.service import cli
from shared.service.lists import print_rows
from shared.service.settings import Directories
from tests.waiting import wait_until
from trainer_service.client import TrainerClient
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.redis_client import connect, read_redis

_SAMPLE_S = 20.0
_WORKERS = 4
_WATCHERS = 20
_CALLS = 300

app = cli.new_app(__doc__)


@dataclass(frozen=True)
class Load:
    """What was asked since the start: commands of Redis, and the seconds of a core that Redis and the trainer took."""

    commands: float
    redis_s: float
    trainer_s: float

    def __sub__(self, other: "Load") -> "Load":
        return Load(self.commands - other.commands, self.redis_s - other.redis_s, self.trainer_s - other.trainer_s)

    def __mul__(self, factor: float) -> "Load":
        return Load(self.commands * factor, self.redis_s * factor, self.trainer_s * factor)

    def __truediv__(self, count: float) -> "Load":
        return self * (1 / count)


class Site:
    """Everything that `gptloop up` starts, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.directories = Directories(folder / "var")
        self.ports = free_ports()
        self.environment = {name: text for name, text in os.environ.items() if name != "REDIS_URL"}
        self.stack = Stack(self.directories, self.ports, self.environment)
        self.stack.up(lambda _: None)
        (self._trainer,) = (each for each in self.stack.status() or [] if each.process.name == "trainer")
        self._redis: Redis = connect(read_redis(self.environment, self.directories))

    def workers(self) -> int:
        """Returns how many workers live."""
        return JobQueue(self._redis, self.directories.open_registry().store.id()).store.workers.count()

    def load(self) -> Load:
        """Returns what was asked until now; asks twice itself."""
        stats, cpu = self._redis.info("stats"), self._redis.info("cpu")
        fields = Path(f"/proc/{self._trainer.process.pid}/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[11]) + int(fields[12])
        return Load(
            stats["total_commands_processed"],
            cpu["used_cpu_user"] + cpu["used_cpu_sys"],
            ticks / os.sysconf("SC_CLK_TCK"),
        )

    def a_second(self) -> Load:
        """Returns what is asked in a second, on average of a sample."""
        before, begun_s = self.load(), time.monotonic()
        time.sleep(_SAMPLE_S)
        return (self.load() - before) / (time.monotonic() - begun_s)

    def a_call(self, call: Callable[[], object]) -> Load:
        """Returns what is asked for a call, beside what is asked without one."""
        quiet, before, begun_s = self.a_second(), self.load(), time.monotonic()
        for _ in range(_CALLS):
            call()
        seconds = time.monotonic() - begun_s
        return (self.load() - before - quiet * seconds) / _CALLS


def _workers(site: Site, stack: ExitStack) -> None:
    for _ in range(_WORKERS):
        worker = subprocess.Popen(
            [sys.executable, "-m", "trainer_service", "work"],
            env=site.environment | {"GPTLOOP_VAR": str(site.directories.var)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(worker.wait)
        stack.callback(worker.terminate)


def _watch(site: Site, job: str) -> None:
    # It is cancelled in the end.
    with suppress(GptloopError), TrainerClient(f"127.0.0.1:{site.ports.trainer}") as client:
        for _ in client.watch(job):
            pass


@app.command()
def main() -> None:
    """Print what each part asks of Redis and of the trainer."""
    rows: list[tuple[str, Load]] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        site = Site(Path(folder))
        stack.callback(site.stack.down)
        client = stack.enter_context(TrainerClient(f"127.0.0.1:{site.ports.trainer}"))
        alone = site.a_second()
        with ExitStack() as others:
            _workers(site, others)
            wait_until(lambda: site.workers() > _WORKERS)
            rows.append(("a worker that waits, a second", (site.a_second() - alone) / _WORKERS))
        job = client.submit(TrainRequest(preset="demo", overrides={"max_steps": "100000"})).job.id
        wait_until(lambda: client.job(job).progress.step > 0)
        running = site.a_second()
        rows.append(("a job that runs, a second", running - alone))
        for _ in range(_WATCHERS):
            threading.Thread(target=_watch, args=(site, job), daemon=True).start()
        time.sleep(2)
        rows.append(("a client that watches, a second", (site.a_second() - running) / _WATCHERS))
        client.cancel(job)
        wait_until(lambda: bool(client.job(job).ended_at.seconds))
        rows.append(("a call for one job", site.a_call(lambda: client.job(job))))
        rows.append(("a list of one job", site.a_call(lambda: list(client.jobs()))))
    print_rows(
        ["what", "commands", "Redis, of a core", "trainer, of a core"],
        [
            [
                what,
                f"{load.commands:.1f}",
                *(f"{max(each, 0) * 1e6:,.0f} µs" for each in (load.redis_s, load.trainer_s)),
            ]
            for what, load in rows
        ],
    )


if __name__ == "__main__":
    cli.run(app)
