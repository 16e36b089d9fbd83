import io
from pathlib import Path

import pytest
from redis import Redis
from rich.console import Console

from shared.errors import GptloopError, Unavailable
from tests.events import PROGRESS, STARTED
from trainer_service import follow as follow_module
from trainer_service.events import (
    Evaluation,
    Event,
    JobState,
    Notice,
    Preparation,
    StateChanged,
    TimedEvent,
    VersionPublished,
)
from trainer_service.follow import follow
from trainer_service.metrics import make_metrics
from trainer_service.queue import JobQueue
from trainer_service.redis_server import connect


def tell(queue: JobQueue, job: str, *events: Event) -> None:
    assert queue.tell(job, 1, [TimedEvent(event) for event in events])


def test_without_a_terminal_every_report_is_a_line(queue: JobQueue, job: str) -> None:
    tell(queue, job, StateChanged(JobState.RUNNING), Preparation("tokenising", 0.1), Preparation("tokenising", 0.9))
    tell(queue, job, STARTED, PROGRESS, Evaluation(1, 10.8, 10.7, 3.5), VersionPublished(1, 1, 10.7, 3.5, True))
    tell(queue, job, Notice("small text"), StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output))
    assert output.getvalue().splitlines() == [
        "queued.",
        "running.",
        "tokenising",
        "52,990,464 parameters (19,495,296 in embeddings) on cpu; 483,000 training and 32,769 held-out tokens (gpt2); "
        "step 1 to 10",
        "step 1/10  loss 10.834  ETA 1:02:05  1,234 tokens/s  best held-out 10.500  lr 1.50e-07",
        "step 1: held-out loss 10.7000 nats per token, 3.5000 bits per byte (training loss 10.8000)",
        "version 1 published, the best so far",
        "note: small text",
        "finished.",
    ]


def test_on_a_terminal_the_same_is_live(queue: JobQueue, job: str) -> None:
    tell(queue, job, Preparation("tokenising"), STARTED, PROGRESS, StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output, force_terminal=True, width=120))
    assert "52,990,464 parameters" in output.getvalue() and "10.834" in output.getvalue()


def test_a_failure_is_raised_with_its_reason(queue: JobQueue, job: str) -> None:
    tell(queue, job, StateChanged(JobState.FAILED, "The text is too short."))
    with pytest.raises(GptloopError, match=r"failed: The text is too short\."):
        follow(queue, job, Console(file=io.StringIO()))


def test_a_job_without_any_worker_is_not_followed_for_ever(
    queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(follow_module, "_WAIT_S", 0.05)
    with pytest.raises(Unavailable, match="make up"):
        follow(queue, job, Console(file=io.StringIO()))


def test_metrics_show_the_run_while_it_runs_and_its_last_numbers_afterwards(
    queue: JobQueue, redis: Redis, job: str
) -> None:
    spec = queue.get(job).spec
    assert spec is not None
    run = {"run": spec.run}
    metrics = make_metrics(queue)
    assert metrics.get_sample_value("gptloop_training_jobs", {"state": "queued"}) == 1
    assert metrics.get_sample_value("gptloop_training_queue_depth") == 1
    assert metrics.get_sample_value("gptloop_training_loss", run) is None
    queue.renew_job_lease(job, 1)
    tell(queue, job, StateChanged(JobState.RUNNING), PROGRESS, Evaluation(1, 10.8, 10.7, 3.5))
    assert metrics.get_sample_value("gptloop_training_tokens_per_second", run) == 1234.5
    assert metrics.get_sample_value("gptloop_training_validation_loss", run) == 10.7
    assert metrics.get_sample_value("gptloop_training_memory_bytes", run | {"kind": "resident"}) == 4
    tell(queue, job, StateChanged(JobState.FINISHED))
    assert metrics.get_sample_value("gptloop_training_tokens_per_second", run) == 0
    assert metrics.get_sample_value("gptloop_training_loss", run) == 10.8344
    assert metrics.get_sample_value("gptloop_training_memory_bytes", run | {"kind": "resident"}) is None


def test_the_metrics_page_stands_while_redis_is_gone(tmp_path: Path) -> None:
    metrics = make_metrics(JobQueue(connect(f"unix://{tmp_path}/none.sock"), "none"))
    assert metrics.get_sample_value("gptloop_training_redis_up") == 0
