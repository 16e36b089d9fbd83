"""A backup of a system at work, restored as another system: the run goes on there as if it had never moved."""

import random
from pathlib import Path

import pytest

from shared.pb.training.v1 import training_pb2 as pb
from shared.service.settings import Directories
from tests.end_to_end.conftest import TINY, System, is_progress, running
from trainer_service.jobs.requests import PrepareRequest, TrainRequest

pytestmark = pytest.mark.slow

INTERVAL = 750
VALUES = TINY | {
    "context_length": "64",
    "dropout": "0.1",
    "max_steps": "3000",
    "evaluation_interval": str(INTERVAL),
}


def put(system: System, text: Path) -> str:
    return system.trainer.submit(TrainRequest(dataset=(str(text),), overrides=VALUES)).job.id


def test_a_run_goes_on_where_its_backup_was_restored(system: System, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    numbers = random.Random(0)
    text.write_text(" ".join(str(numbers.randrange(1000)) for _ in range(20_000)))
    never_moved = put(system, text)
    system.finish(never_moved)
    moved = put(system, text)
    waiting = system.trainer.submit(PrepareRequest(dataset=(str(text),), overrides=VALUES, after=(moved,))).job.id
    system.watch(moved, is_progress(INTERVAL + 20))
    with system.client() as client:
        # Backed up while a stream is open.
        stream = iter(client.generate("1", max_tokens=100))
        next(stream)
        ended = system.command("deploy.cli", "backup", str(tmp_path / "backup.tar"))
        assert ended.returncode == 0, ended.stderr
        assert len(list(stream)) > 1
    system.finish(moved)
    assert system.command("deploy.cli", "verify").returncode == 0
    there = Directories(tmp_path / "there")
    environment = {**system.environment, "GPTLOOP_VAR": str(there.var)}
    restored = system.command("deploy.cli", "restore", str(tmp_path / "backup.tar"), environment=environment)
    assert restored.returncode == 0, restored.stderr
    assert system.command("deploy.cli", "verify", environment=environment).returncode == 0
    with running(there) as elsewhere:
        assert elsewhere.end(moved).state == elsewhere.end(waiting).state == pb.JOB_STATE_FINISHED
        result, expected = elsewhere.result(moved), system.result(never_moved)
        assert elsewhere.queue.store.get(moved).attempt == 2
        assert (result.last_step, result.state) == (expected.last_step, expected.state)
        assert set(result.weights) == set(expected.weights) and result.weights == expected.weights
