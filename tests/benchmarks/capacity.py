"""Computes and measures what gptloop takes: memory, disk, start times (deploy/capacity.md).

python -m tests.benchmarks.capacity presets             computed from the presets
python -m tests.benchmarks.capacity redis               a Redis of its own with jobs and their events
python -m tests.benchmarks.capacity processes FOLDER    starts everything on a copy of a folder of state
"""

import os
import shutil
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from redis import Redis

from deploy.ports import free_ports
from deploy.stack import Stack
from inference_service.client import InferenceClient
from inference_service.settings import Settings
from shared.gpt.config import count_parameters
from shared.registry.retention import Retention
from shared.service import cli
from shared.service.lists import print_rows
from shared.service.settings import Directories
from shared.text import format_size
from tests.redis_process import RedisServer
from tests.registries import disk_registry
from trainer_service.jobs.events import (
    Evaluation,
    Event,
    JobState,
    Progress,
    RunStarted,
    StateChanged,
    TimedEvent,
    VersionPublished,
)
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest
from trainer_service.plan import Machine, count_moments, memory_bytes
from trainer_service.presets import PRESETS

_FLOAT_BYTES = 4
_BF16_BYTES, _INT8_BYTES = 2, 1
# Two threads, and more memory than any preset takes.
_MACHINE = Machine(64 << 30, 2)
_JOBS = 1000
_IDLE_S = 60.0
_REQUESTS = 1000

app = cli.new_app(__doc__)


@app.command()
def presets() -> None:
    """Print what each preset takes on the disk and in memory."""
    rows = []
    keep = Retention()
    settings = Settings(Directories(Path()))
    for name, config in PRESETS.items():
        parameters = count_parameters(config.gpt).total
        version, state = _FLOAT_BYTES * parameters, _FLOAT_BYTES * (parameters + count_moments(config))
        published = -(-config.max_steps // config.evaluation_interval)
        # While a version is written, those that it displaces are still there; the best one has its state, too.
        most = (min(published, keep.newest + keep.best) + 1) * version + (keep.states + 2) * state
        # In the default format of a CPU, beside the fp32 weights of the version that is being loaded.
        slot = 2 * config.layers * config.context_length * config.width * _BF16_BYTES
        resident = _INT8_BYTES * parameters + settings.slots * slot + (settings.prefix_cache_mib << 20)
        server = settings.resident_versions * resident + version
        sizes = (version, state, most, slot, server, memory_bytes(config, _MACHINE) or 0)
        rows.append([name, str(published), *map(format_size, sizes)])
    print_rows(["preset", "versions", "version", "state", "a run keeps", "a slot", "server at most", "training"], rows)


@app.command()
def redis() -> None:
    """Print the memory and the disk that Redis takes for jobs like those of the preset demo, with all their events."""
    with tempfile.TemporaryDirectory() as folder:
        var = Path(folder)
        server = RedisServer(var)
        try:
            connection = server.connect()
            queue = JobQueue(connection, "benchmark")
            registry = disk_registry(var / "registry")
            before = _redis_bytes(connection, var)
            for number in range(_JOBS):
                job = queue.enqueue(TrainRequest(preset="demo", name=f"run-{number}").resolve(registry)).id
                queue.attempts.remove(job, 1)
                queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.RUNNING))])
                # The reporter sends some events at a time.
                events = iter(_events())
                while some := list(islice(events, 5)):
                    queue.store.report(job, 1, [TimedEvent(event) for event in some])
                queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
            after = _redis_bytes(connection, var)
        finally:
            server.end()
    memory, disk = (format_size(now - then) for now, then in zip(after, before, strict=True))
    print(f"{_JOBS:,} finished jobs with {len(_events()) + 3} events each: {memory} of memory, {disk} of disk.")


def _events() -> list[Event]:
    config = PRESETS["demo"]
    started = RunStarted(1_585_600, 327_680, 660_480, 49_152, "bpe", 1, 0, config.max_steps, "cpu")
    events: list[Event] = [started]
    for step in range(config.report_interval, config.max_steps + 1, config.report_interval):
        tokens = step * config.tokens_per_step
        progress = Progress(
            step=step,
            loss=1.2345678,
            learning_rate=0.002345,
            gradient_norm=0.5678,
            tokens=tokens,
            tokens_per_second=8662.5,
            eta_s=60.5,
            best_validation_loss=1.23,
            max_steps=config.max_steps,
            active_memory_bytes=18 << 20,
            cache_memory_bytes=18 << 20,
            peak_memory_bytes=178 << 20,
            resident_memory_bytes=416 << 20,
        )
        events.append(progress)
        if step % config.evaluation_interval == 0:
            events += [Evaluation(step, 1.23, 1.25, 0.38), VersionPublished(1, step, 1.23, 0.38, True)]
    return events


def _redis_bytes(connection: Redis, var: Path) -> tuple[int, int]:
    disk = sum(path.stat().st_size for path in (var / "redis").rglob("*") if path.is_file())
    return int(connection.info("memory")["used_memory"]), disk


@app.command()
def processes(
    folder: Annotated[Path, typer.Argument(help="A folder of state with a version; it is copied.")],
) -> None:
    """Start everything on a copy of a folder of state, and print start times, memory, and the size of the logs."""
    with tempfile.TemporaryDirectory() as temporary:
        directories = Directories(Path(temporary) / "var")
        shutil.copytree(folder, directories.var)
        for path in (directories.log, directories.var / "run"):
            shutil.rmtree(path, ignore_errors=True)
        ports = free_ports()
        stack = Stack(directories, ports, {name: text for name, text in os.environ.items() if name != "REDIS_URL"})
        begun_s = time.monotonic()
        stack.up(lambda _: None)
        healthy_s = time.monotonic() - begun_s
        with InferenceClient(f"127.0.0.1:{ports.inference}", retries=100) as client:
            "".join(client.generate("Once", max_tokens=1).text())
            token_s = time.monotonic() - begun_s
            idle = _log_bytes(directories)
            time.sleep(_IDLE_S)
            idle = _log_bytes(directories) - idle
            busy = _log_bytes(directories)
            for _ in range(_REQUESTS):
                "".join(client.generate("Once", max_tokens=1).text())
            busy = _log_bytes(directories) - busy
        rows = [
            [each.process.name, format_size(_resident_bytes(each.process.pid or 0))] for each in stack.status() or []
        ]
        begun_s = time.monotonic()
        stack.down()
        stopped_s = time.monotonic() - begun_s
    print(f"Healthy after {healthy_s:.1f} s, first token after {token_s:.1f} s, stopped in {stopped_s:.1f} s.")
    print(f"Logs: {idle * 3600 / _IDLE_S:,.0f} bytes an hour at rest, {busy:,} bytes for {_REQUESTS:,} requests.")
    print_rows(["process", "resident memory"], rows)


def _log_bytes(directories: Directories) -> int:
    return sum(path.stat().st_size for path in directories.log.iterdir())


def _resident_bytes(pid: int) -> int:
    pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGESIZE")


if __name__ == "__main__":
    cli.run(app)
