"""The trace of a job, and of a call to the trainer that asks Redis, received by a collector."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.collector import collecting
from tests.redis_process import PROJECT, RedisServer
from tests.registries import disk_registry, registry_id
from tests.waiting import HANG_S, wait_until
from trainer_service.client import TrainerClient
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import TrainRequest

pytest.importorskip("opentelemetry.sdk", reason="`make .venv/traces` installs OpenTelemetry")

pytestmark = pytest.mark.slow

TINY = {
    "vocabulary_size": "400",
    "layers": "1",
    "width": "16",
    "heads": "1",
    "hidden_width": "32",
    "context_length": "32",
    "batch_size": "2",
    "max_train_tokens": "20000",
    "evaluation_windows": "2",
    "max_steps": "4",
    "evaluation_interval": "2",
    "warmup_steps": "1",
}


def environment(var: Path, redis_url: str, **settings: str) -> dict[str, str]:
    own = {"GPTLOOP_VAR": str(var), "REDIS_URL": redis_url, "GPTLOOP_LOG_FORMAT": "json"}
    return os.environ | own | {"GPTLOOP_TRAINER_PORT": "0", "GPTLOOP_TRAINER_METRICS_PORT": "0"} | settings


def test_a_job_is_a_trace_of_its_attempt_with_its_phases(
    redis: Redis, redis_server: RedisServer, tmp_path: Path
) -> None:
    queue = JobQueue(redis, registry_id(tmp_path / "registry"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Story {number} of a dog and {number * 7} cats." for number in range(400)))
    spec = TrainRequest(dataset=(str(text),), overrides=TINY).resolve(disk_registry(tmp_path / "registry"))
    job = queue.enqueue(spec).id
    # Reuses the kernels that earlier tests compiled.
    cache = PROJECT / ".pytest_cache" / "server"
    cache.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache").symlink_to(cache)
    with collecting() as collector:
        done = subprocess.run(
            [sys.executable, "-m", "trainer_service.job_process", job, "1", str(os.getpid())],
            cwd=PROJECT,
            env=environment(tmp_path, redis_server.url, **collector.settings),
            stderr=subprocess.PIPE,
            text=True,
            timeout=HANG_S,
        )
        assert done.returncode == 0, done.stderr
        root = collector.named("job train")
        expected = {"gptloop.job": job, "gptloop.attempt": 1, "gptloop.run": spec.run}
        assert root.attributes.items() >= expected.items()
        assert (root.parent, root.service) == ("", "gptloop-trainer")
        phases = [span for span in collector.spans if span.parent == root.id]
        assert [span.name for span in phases] == ["prepare", "train"]
        checkpoints = [span for span in collector.spans if span.parent == phases[1].id]
        assert [(span.name, span.attributes["gptloop.version"]) for span in checkpoints] == [
            ("checkpoint", 1),
            ("checkpoint", 2),
        ]


def test_a_call_to_the_trainer_shows_what_it_asks_of_redis(
    redis: Redis, redis_server: RedisServer, tmp_path: Path
) -> None:
    with collecting() as collector:
        trainer = subprocess.Popen(
            [sys.executable, "-m", "trainer_service", "serve"],
            cwd=PROJECT,
            env=environment(tmp_path, redis_server.url, **collector.settings),
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert trainer.stderr is not None
            line: dict[str, Any] = json.loads(trainer.stderr.readline())
            address = re.search(r"gRPC on (\S+),", str(line["message"]))
            assert address is not None
            with TrainerClient(address[1]) as client:
                assert list(client.jobs()) == []
            call = collector.named("training.v1.TrainingService/ListJobs")
            wait_until(lambda: any(span.parent == call.id for span in collector.spans))
            # What the process asks of Redis all the time is not traced.
            assert {span.trace for span in collector.spans} == {call.trace}
        finally:
            trainer.terminate()
            trainer.communicate(timeout=HANG_S)
    assert trainer.returncode == 0
