"""Foreign content of Redis and odd names of files break neither lists nor streams nor metrics."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from redis import Redis

from shared.errors import InvalidArgument, NotFound
from shared.pb.training.v1 import training_pb2 as pb
from tests.asynchronous import async_test
from tests.events import PROGRESS, STARTED
from tests.jobs import EVALUATION, events_of, finish, report, start, training
from tests.redis_process import PROJECT, RedisServer
from tests.registries import disk_registry
from tests.trainer_service.serving import watched
from tests.waiting import HANG_S
from trainer_service import server as server_module
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import read_record
from trainer_service.jobs.requests import EvaluateRequest, JobRequest, PrepareRequest, TrainRequest
from trainer_service.jobs.specs import Kind
from trainer_service.jobs.watch import Watch
from trainer_service.listings import print_jobs
from trainer_service.metrics import make_metrics
from trainer_service.runs import all_runs
from trainer_service.server import TrainingServicer
from trainer_service.text.corpus import DatasetSpec
from trainer_service.translate import event_to_pb, job_to_pb

# A file named in Latin-1, as Python names it.
LATIN = "caf\udce9.txt"


async def listed(servicer: TrainingServicer, **values: int) -> list[pb.Job]:
    """Returns all jobs, as a client gets them: over the wire, page by page."""
    found: list[pb.Job] = []
    token = ""
    while True:
        request = pb.ListJobsRequest(page_token=token, **values)  # type: ignore[arg-type]
        answer = await servicer.ListJobs(request, None)
        assert len(answer.SerializeToString()) < 4 << 20
        found += answer.jobs
        if not (token := answer.next_page_token):
            return found


ODD: dict[str, Callable[[Redis, str], object]] = {
    "an unknown kind": lambda redis, key: redis.hset(key, "kind", "dance"),
    "no kind": lambda redis, key: redis.hdel(key, "kind"),
    "no spec": lambda redis, key: redis.hdel(key, "spec"),
    "a spec of another kind": lambda redis, key: redis.hset(key, "spec", "[1, 2]"),
    "a deep spec": lambda redis, key: redis.hset(key, "spec", "[" * 100_000),
    "a name that leaves its folder": lambda redis, key: redis.hset(key, "spec", '{"run": "../x"}'),
    "bytes that are no text": lambda redis, key: redis.hset(key, "spec", b"\xff\xfe"),
    "an unknown state": lambda redis, key: redis.hset(key, "state", "asleep"),
    "a huge attempt": lambda redis, key: redis.hset(key, "attempt", "9" * 5000),
    "a time beyond all": lambda redis, key: redis.hset(key, "enqueued_at", "1e300"),
    "no time": lambda redis, key: redis.hset(key, "started_at", "nan"),
    "a progress that is none": lambda redis, key: redis.hset(key, "Progress", "{}"),
    "a step beyond 64 bits": lambda redis, key: redis.hset(
        key, "Progress", TimedEvent(replace(PROGRESS, step=10**30)).to_json()
    ),
    "a loss that is text": lambda redis, key: redis.hset(
        key,
        "Progress",
        TimedEvent(replace(PROGRESS, loss="x")).to_json(),  # type: ignore[arg-type]
    ),
    "a loss that is no number": lambda redis, key: redis.hset(
        key, "Progress", TimedEvent(replace(PROGRESS, loss=float("nan"))).to_json()
    ),
    "a megabyte as reason": lambda redis, key: redis.hset(key, "reason", "x" * (1 << 20)),
    "another type": lambda redis, key: (redis.delete(key), redis.set(key, "no hash")),
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@async_test
async def test_an_invalid_job_is_listed_with_its_valid_fields(
    servicer: TrainingServicer,
    queue: JobQueue,
    redis: Redis,
    job: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Redis, str], object],
) -> None:
    other = queue.enqueue(training(tmp_path)).id
    change(redis, queue.store.keys.job(job))
    assert [each.id for each in await listed(servicer)] == [other, job]
    assert (await servicer.GetJob(pb.GetJobRequest(job_id=job), None)).job.id == job
    generate_latest(make_metrics(queue, disk_registry(tmp_path / "registry")))
    for as_json in (False, True):
        print_jobs(list(queue.store.jobs()), as_json)
        assert job in capsys.readouterr().out
    all_runs(queue.store.jobs(kinds=[Kind.TRAIN]), disk_registry(tmp_path / "registry"))


@async_test
async def test_an_invalid_job_gives_a_reason_and_keeps_its_state(
    servicer: TrainingServicer, queue: JobQueue, redis: Redis, job: str
) -> None:
    redis.hset(queue.store.keys.job(job), "spec", '{"run": 7}')
    (shown,) = await listed(servicer)
    assert (shown.run, shown.state) == ("", pb.JOB_STATE_QUEUED)
    assert shown.reason.startswith("This job cannot be understood: ") and len(shown.reason) < 300
    assert (await servicer.CancelJob(pb.CancelJobRequest(job_id=job), None)).job.state == pb.JOB_STATE_CANCELLED


@async_test
async def test_a_file_name_that_is_not_unicode_is_shown_with_escapes(
    servicer: TrainingServicer, queue: JobQueue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queue.enqueue(replace(training(tmp_path), data=DatasetSpec((LATIN,))))
    (shown,) = await listed(servicer)
    assert list(shown.dataset) == [r"caf\udce9.txt"]
    print_jobs(list(queue.store.jobs()), False)
    assert r"caf\udce9.txt" in capsys.readouterr().out


@async_test
async def test_pages_of_large_jobs_are_small_and_lose_none(
    servicer: TrainingServicer, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_MAX_PAGE_BYTES", 40_000)
    names = tuple(f"{number:04d}".ljust(4000, "x") for number in range(1000))
    large = replace(training(tmp_path), data=DatasetSpec(names))
    jobs = [queue.enqueue(replace(large, run=f"run-{number}")).id for number in range(5)]
    first = await servicer.ListJobs(pb.ListJobsRequest(), None)
    assert len(first.jobs) == 2 and first.ByteSize() < 40_000
    found = await listed(servicer)
    assert [each.id for each in found] == jobs[::-1]
    assert found[0].dataset[0] == names[0] and found[0].dataset[-1] == "… and 996 more"


@async_test
async def test_jobs_of_one_moment_are_on_one_page_each(
    servicer: TrainingServicer, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    jobs = [queue.enqueue(training(tmp_path)).id for _ in range(5)]
    assert [each.id for each in await listed(servicer, page_size=1)] == jobs[::-1]


@pytest.mark.parametrize("event", [b"", b"{}", b"\xff", b'{"kind": "Nap", "time": 1, "values": {}}', b"[" * 100_000])
@async_test
async def test_an_invalid_event_does_not_end_a_watch(
    servicer: TrainingServicer, queue: JobQueue, redis: Redis, job: str, event: bytes
) -> None:
    redis.xadd(queue.store.keys.events(job), {"event": event})
    redis.xadd(queue.store.keys.events(job), {"other": b"x"})
    report(queue, job, Notice("after"), StateChanged(JobState.FINISHED))
    texts = [
        response.notice.text for response in await watched(servicer, job) if response.WhichOneof("event") == "notice"
    ]
    assert [text.partition(":")[0] for text in texts] == 2 * ["An event of this job cannot be understood"] + ["after"]


def test_a_lost_attempt_with_an_invalid_start_is_followed_by_another(queue: JobQueue, redis: Redis, job: str) -> None:
    start(queue, job)
    report(queue, job, STARTED)
    redis.hset(queue.store.keys.job(job), "RunStarted", "?")
    assert queue.lose(job, 1, "It crashed") and queue.store.get(job).attempt == 2


@pytest.mark.parametrize("odd", ["?", "-1", "9" * 5000, ""])
def test_invalid_numbers_of_one_job_do_not_affect_others(queue: JobQueue, redis: Redis, job: str, odd: str) -> None:
    start(queue, job)
    report(queue, job, STARTED)
    redis.hset(queue.store.keys.job(job), mapping={"crash_step": odd, "crashes": odd})
    redis.hdel(queue.store.keys.job(job), "after")
    assert queue.lose(job, 1, "It crashed") and queue.store.get(job).attempt == 2
    waiting = queue.attempts.waiting()
    redis.rpush(queue.attempts.rq.key, f"{queue.registry}-{job}-{'9' * 5000}")
    assert queue.attempts.waiting() == waiting
    Watch(queue).look()


def test_values_out_of_bounds_are_rejected_with_a_short_sentence(tmp_path: Path) -> None:
    registry = disk_registry(tmp_path / "registry")
    long = "x" * 100_000

    wrong: list[JobRequest] = [
        TrainRequest(dataset=(long,)),
        TrainRequest(dataset=("a\0b",)),
        TrainRequest(dataset=("a.txt",) * 1001),
        TrainRequest(validation=("a.txt",) * 1001),
        TrainRequest(preset=long),
        TrainRequest(overrides={long: "1"}),
        TrainRequest(overrides={"max_steps": "9" * 5000}),
        TrainRequest(overrides={str(number): "1" for number in range(101)}),
        TrainRequest(after=("a",) * 101),
        TrainRequest(notes="n" * 2001),
        TrainRequest(notes="bell\a"),
        TrainRequest(resume=2**63),
        TrainRequest(resume=-1),
        TrainRequest(name=long),
        PrepareRequest(dataset=(long,)),
        EvaluateRequest(after=("a",) * 101),
        EvaluateRequest(version=long),
        EvaluateRequest(version="9" * 5000),
    ]
    for request in wrong:
        with pytest.raises(InvalidArgument) as refused:
            request.resolve(registry)
        assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("name", ["", "x\n" * 100_000, "caf\udce9", "*", "a:b"])
def test_an_invalid_job_id_is_not_found_with_a_short_sentence(queue: JobQueue, name: str) -> None:
    for ask in (queue.store.get, queue.cancel):
        with pytest.raises(NotFound, match="There is no job") as refused:
            ask(name)
        assert len(str(refused.value)) <= 300 and "\n" not in str(refused.value)


TEXT = st.text(st.characters(exclude_categories=()), max_size=50)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["kind", "spec", "state", "attempt", "after", "reason", "enqueued_at", "Progress", "best"]),
        st.sampled_from(["train", "evaluate", "running", "1", EVALUATION.to_json(), TimedEvent(PROGRESS).to_json()])
        | TEXT
        | JSON.map(json.dumps),
        min_size=1,
    )
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_content_of_a_record_can_be_written_to_a_message(fields: dict[str, str]) -> None:
    job_to_pb(read_record("a", fields)).SerializeToString()


@given(values=st.dictionaries(st.sampled_from(sorted(vars(PROGRESS))), JSON), moment=JSON)
def test_any_event_is_either_rejected_or_can_be_written_to_a_message(values: dict[str, object], moment: object) -> None:
    text = json.dumps({"kind": "Progress", "time": moment, "values": vars(PROGRESS) | values})
    try:
        event = TimedEvent.from_json(text)
    except ValueError:
        return
    event_to_pb(event).SerializeToString()


def test_a_finished_job_has_no_reason(queue: JobQueue, job: str) -> None:
    start(queue, job)
    finish(queue, job)
    assert events_of(queue, job)[-1] == StateChanged(JobState.FINISHED)


@pytest.mark.parametrize("score", [math.inf, -math.inf, 1e300, -5.0, 0.5])
@async_test
async def test_foreign_members_of_the_lists_of_jobs_hide_and_stop_nothing(
    queue: JobQueue, redis: Redis, servicer: TrainingServicer, job: str, tmp_path: Path, score: float
) -> None:
    for key in (queue.store.keys.jobs, queue.store.keys.open):
        for member in (b"\xff", b"foreign"):
            redis.zadd(key, {member: score})
    assert queue.store.get(job).ahead == 0
    other = queue.enqueue(training(tmp_path, name="other")).id
    assert [each.id for each in await listed(servicer)] == [other, job]
    assert queue.store.get(other).ticket > queue.store.get(job).ticket
    Watch(queue).look()
    assert queue.cancel(job).state is JobState.CANCELLED


def test_a_job_is_read_although_the_list_of_jobs_has_another_type(queue: JobQueue, redis: Redis, job: str) -> None:
    redis.delete(queue.store.keys.jobs)
    redis.set(queue.store.keys.jobs, "x")
    assert queue.store.get(job).state is JobState.QUEUED


@pytest.mark.parametrize("odd", ["", "x", "9" * 5000, "-1", "²"])
def test_a_count_that_is_no_number_counts_nothing(queue: JobQueue, redis: Redis, odd: str) -> None:
    for key in (queue.store.keys.tokens, queue.store.keys.diverged):
        redis.set(key, odd)
    assert (queue.store.tokens(), queue.store.diverged()) == (0, 0)


def test_an_event_at_a_time_that_no_float_holds_is_invalid() -> None:
    text = TimedEvent(Notice("a"), 1.0).to_json().replace("1.0", "1" + "0" * 400)
    with pytest.raises(ValueError, match="it is not an event"):
        TimedEvent.from_json(text)


@pytest.mark.slow
def test_the_process_of_a_job_that_is_gone_says_so_in_one_line(
    redis: Redis, redis_server: RedisServer, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trainer_service.job_process", "gone", "1", str(os.getpid())],
        cwd=PROJECT,
        env=os.environ | {"GPTLOOP_VAR": str(tmp_path), "REDIS_URL": redis_server.url},
        stderr=subprocess.PIPE,
        text=True,
        timeout=HANG_S,
    )
    (line,) = done.stderr.splitlines()
    assert (done.returncode, "job gone does not start: There is no job 'gone'" in line) == (1, True), line
