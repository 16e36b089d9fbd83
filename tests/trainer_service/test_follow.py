import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from shared.errors import GptloopError, Unavailable
from tests.events import PROGRESS, STARTED
from tests.jobs import EVALUATION, report, start, training
from tests.redis_process import RedisServer
from tests.waiting import wait_until
from trainer_service import follow as follow_module
from trainer_service.follow import follow
from trainer_service.jobs.events import (
    Evaluation,
    JobState,
    Notice,
    Preparation,
    StateChanged,
    VersionPublished,
)
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_client import RedisAddress, connect


def test_without_a_terminal_every_report_is_a_line(queue: JobQueue, job: str) -> None:
    report(queue, job, StateChanged(JobState.RUNNING), Preparation("tokenising", 0.1), Preparation("tokenising", 0.9))
    report(queue, job, STARTED, PROGRESS, Evaluation(1, 10.8, 10.7, 3.5), VersionPublished(1, 1, 10.7, 3.5, True))
    report(queue, job, Notice("small text"), replace(PROGRESS, step=2), StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output, width=80, height=40))
    assert output.getvalue().splitlines() == [
        "queued.",
        "running.",
        "tokenising",
        "52,990,464 parameters (19,495,296 in embeddings) on cpu; 483,000 training and 32,769 held-out tokens (gpt2); "
        "step 1 to 10",
        "step 1/10  loss 10.834  ETA 1 h  1,234 tokens/s  best held-out 10.500  lr 1.50e-07",
        "step 1: held-out loss 10.7000 nats per token, 3.5000 bits per byte (training loss 10.8000)",
        "version 1 published, the best so far",
        "note: small text",
        "step 2/10  loss 10.834  ETA 1 h  1,234 tokens/s  best held-out 10.500  lr 1.50e-07",
        "finished.",
    ]


def test_on_a_terminal_the_same_is_live(queue: JobQueue, job: str) -> None:
    report(queue, job, Preparation("tokenising"), STARTED, PROGRESS, StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output, force_terminal=True, width=120))
    assert "52,990,464 parameters" in output.getvalue() and "10.834" in output.getvalue()


def test_on_a_terminal_the_losses_are_a_curve(queue: JobQueue, job: str) -> None:
    early = [replace(PROGRESS, step=step, loss=11.0 - step) for step in range(1, 9)]
    # The second attempt begins after step 4.
    late = [replace(PROGRESS, step=step, loss=5.0) for step in (5, 6)]
    report(queue, job, STARTED, *early, Evaluation(8, 3.0, 2.0, 1.0), replace(STARTED, first_step=5), *late)
    report(queue, job, Evaluation(6, 5.0, 8.0, 1.0), StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output, force_terminal=True, color_system=None, width=60, height=24))
    legend, *curve, steps = output.getvalue().splitlines()[-10:]
    assert legend.endswith("       loss: ⠒ training, ● held-out")
    assert curve[0].startswith(" 10.00 ⠉⠒") and curve[-1].startswith("  5.00 ")
    assert [line.count("●") for line in curve] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert steps.split() == ["step", "1", "6"]


def test_a_low_terminal_shows_no_curve(queue: JobQueue, job: str) -> None:
    report(queue, job, STARTED, PROGRESS, replace(PROGRESS, step=2), StateChanged(JobState.FINISHED))
    shown = []
    for height in (20, 19):
        output = io.StringIO()
        follow(queue, job, Console(file=output, force_terminal=True, width=60, height=height))
        shown.append("loss: ⠒ training" in output.getvalue())
    assert shown == [True, False]


def test_a_failure_is_raised_with_its_reason(queue: JobQueue, job: str) -> None:
    report(queue, job, StateChanged(JobState.FAILED, "The text is too short."))
    with pytest.raises(GptloopError, match=r"failed: The text is too short\."):
        follow(queue, job, Console(file=io.StringIO()))


def test_a_job_without_a_live_worker_is_followed_only_for_a_limited_time(
    queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "PATIENCE_S", 0.1)
    monkeypatch.setattr(follow_module, "_WAIT_S", 0.05)
    with pytest.raises(Unavailable, match="gptloop up"):
        follow(queue, job, Console(file=io.StringIO()))


def test_following_continues_after_redis_was_killed_and_restarted(
    mortal_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "_WAIT_S", 0.1)
    queue = JobQueue(mortal_redis.connect(), "one")
    job = queue.enqueue(training(tmp_path)).id
    start(queue, job)
    # Follows with another connection.
    output = io.StringIO()
    followed = threading.Thread(
        target=follow, args=(JobQueue(mortal_redis.connect(), "one"), job, Console(file=output))
    )
    followed.start()
    wait_until(lambda: "running." in output.getvalue())
    mortal_redis.kill()
    wait_until(lambda: "note: Redis does not answer" in output.getvalue())
    mortal_redis.start()
    wait_until(lambda: "note: Redis answers again." in output.getvalue())
    report(queue, job, PROGRESS, StateChanged(JobState.FINISHED))
    followed.join(20)
    assert output.getvalue().splitlines()[-2:] == [follow_module.describe(PROGRESS), "finished."]


def test_following_waits_for_redis_only_for_a_limited_time(
    queue: JobQueue, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "OUTAGE_S", 0.1)
    monkeypatch.setattr(follow_module, "_WAIT_S", 0.05)
    gone = JobQueue(connect(RedisAddress("unix:///none.sock")), queue.registry)
    with pytest.raises(Unavailable, match=f"gptloop watch {job}"):
        follow(gone, job, Console(file=io.StringIO()))


def test_a_waiting_job_shows_how_many_jobs_come_first(queue: JobQueue, job: str, tmp_path: Path) -> None:
    last = queue.enqueue(EVALUATION, after=[job]).id
    output = io.StringIO()
    queue.store.workers.renew("a", Offer())
    followed = threading.Thread(target=follow, args=(queue, last, Console(file=output)))
    followed.start()
    wait_until(lambda: "waiting for a worker: 1 job comes first" in output.getvalue())
    assert follow_module.describe_job(queue.store.get(last)) == f"after {job}; 1 job comes first"
    queue.cancel(last)
    followed.join(20)
    assert output.getvalue().splitlines()[-1] == "cancelled."


def test_a_waiting_job_shows_which_worker_it_waits_for(queue: JobQueue, job: str, tmp_path: Path) -> None:
    last = queue.enqueue(training(tmp_path, needs="gpu")).id
    output = io.StringIO()
    queue.store.workers.renew("a", Offer())
    followed = threading.Thread(target=follow, args=(queue, last, Console(file=output)))
    followed.start()
    wait_until(lambda: "waiting for a worker with a GPU, and none is alive: 1 job comes first" in output.getvalue())
    assert follow_module.describe_job(queue.store.get(last)) == "waits for a worker with a GPU; 1 job comes first"
    queue.cancel(last)
    followed.join(20)


def test_a_job_that_waits_at_its_step_waits_for_its_sweep(queue: JobQueue, job: str, tmp_path: Path) -> None:
    suspended = queue.enqueue(replace(training(tmp_path), until=3)).id
    start(queue, suspended)
    queue.suspend(suspended, 1, Evaluation(3, 2.0, 1.9, 0.9))
    record = queue.store.get(suspended)
    assert (record.ahead, record.awaited) == (None, "") and follow_module.describe_job(record) == "Waits at step 3."
    assert follow_module._describe_wait(record) == "waiting for its sweep"


def test_the_result_of_an_evaluation_is_one_line_with_version_and_text() -> None:
    measured = Evaluation(1200, None, 1.234, 0.456, version=7, windows=1000, text="letters.txt")
    assert follow_module.describe(measured) == (
        "version 7: held-out loss 1.2340 nats per token, 0.4560 bits per byte, on 1,000 windows of letters.txt"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_control_characters_in_a_notice_are_escaped(queue: JobQueue, job: str, terminal: bool) -> None:
    report(queue, job, Notice("a\x1b]0;title\x07b\udce9"), StateChanged(JobState.FINISHED))
    output = io.StringIO()
    follow(queue, job, Console(file=output, force_terminal=terminal, width=120))
    assert r"note: a\x1b]0;title\x07b\udce9" in output.getvalue()


def test_after_the_first_step_no_eta_is_shown() -> None:
    line = follow_module.describe(replace(PROGRESS, eta_s=None))
    assert line is not None and "speed not yet known" in line and "ETA" not in line and "tokens/s" not in line
