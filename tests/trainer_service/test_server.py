"""The TrainingService's answers from a real Redis, without a network between."""

import asyncio
import logging
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from shared.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from tests.asynchronous import async_test
from tests.jobs import report, start, training
from tests.redis_process import RedisServer
from tests.registries import disk_registry
from tests.trainer_service.serving import listening, watched
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service import server as server_module
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.metrics import CallMetrics
from trainer_service.redis_client import RedisAddress, connect
from trainer_service.server import SERVICE, TrainingServicer


async def enqueue(servicer: TrainingServicer, **values: object) -> pb.Job:
    request = pb.EnqueueJobRequest(**values)  # type: ignore[arg-type]
    return (await servicer.EnqueueJob(request, None)).job


@async_test
async def test_a_watch_receives_every_event_of_a_job(servicer: TrainingServicer, queue: JobQueue) -> None:
    job = (await enqueue(servicer)).id
    queue.store.report(job, 1, [TimedEvent(Notice(str(number))) for number in range(2500)])
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    events = await watched(servicer, job)
    assert [event.notice.text for event in events[1:-1]] == [str(number) for number in range(2500)]
    assert events[-1].state_changed.state == pb.JOB_STATE_FINISHED


@async_test
async def test_a_job_on_unknown_stories_is_refused(servicer: TrainingServicer, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no set of stories 'noon'"):
        await enqueue(servicer, dataset=["builtin", "teacher:noon"])
    add_stories(tmp_path / "data", tales(0, 1), "noon")
    assert (await enqueue(servicer, dataset=["builtin", "teacher:noon"])).dataset == ["builtin", "teacher:noon"]


@async_test
async def test_a_watch_of_an_ended_job_without_events_ends(
    servicer: TrainingServicer, queue: JobQueue, redis: Redis
) -> None:
    job = (await enqueue(servicer)).id
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    redis.delete(queue.store.keys.events(job))
    assert await watched(servicer, job) == []
    redis.delete(queue.store.keys.job(job))
    with pytest.raises(NotFound):
        await watched(servicer, job)


@async_test
async def test_jobs_are_listed_in_pages_by_state_and_kind(servicer: TrainingServicer, queue: JobQueue) -> None:
    jobs = [(await enqueue(servicer)).id for _ in range(5)]
    prepared = await enqueue(servicer, kind=pb.JOB_KIND_PREPARE, after=[jobs[0]])
    assert (prepared.kind, list(prepared.after), prepared.attempt) == (pb.JOB_KIND_PREPARE, [jobs[0]], 1)
    queue.cancel(jobs[2])

    async def page(**values: object) -> pb.ListJobsResponse:
        request = pb.ListJobsRequest(**values)  # type: ignore[arg-type]
        return await servicer.ListJobs(request, None)

    found, token = [], ""
    while True:
        answer = await page(page_size=2, page_token=token, states=[pb.JOB_STATE_QUEUED], kinds=[pb.JOB_KIND_TRAIN])
        found += [job.id for job in answer.jobs]
        if not (token := answer.next_page_token):
            break
    assert found == [jobs[4], jobs[3], jobs[1], jobs[0]]
    assert [job.id for job in (await page(kinds=[pb.JOB_KIND_PREPARE])).jobs] == [prepared.id]
    for wrong in ({"page_token": "bmFu"}, {"page_token": "x"}, {"page_size": -1}, {"states": [99]}, {"kinds": [99]}):
        with pytest.raises(InvalidArgument):
            await page(**wrong)


@async_test
async def test_invalid_requests_are_rejected(servicer: TrainingServicer) -> None:
    for wrong in ({"kind": 99}, {"version": "3"}, {"kind": pb.JOB_KIND_EVALUATE, "preset": "demo"}):
        with pytest.raises(InvalidArgument):
            await enqueue(servicer, **wrong)
    with pytest.raises(NotFound):
        await enqueue(servicer, after=["x"])


@async_test
async def test_a_watch_continues_after_redis_was_killed_and_restarted(
    mortal_redis: RedisServer, tmp_path: Path
) -> None:
    queue = JobQueue(mortal_redis.connect(), "one")
    servicer = TrainingServicer(queue, disk_registry(tmp_path / "registry"), tmp_path / "data")
    job = queue.enqueue(training(tmp_path)).id
    start(queue, job)

    async def go_on() -> None:
        # The watch meets Redis while it is gone.
        await asyncio.sleep(0.5)
        await asyncio.to_thread(mortal_redis.start)
        await asyncio.to_thread(report, queue, job, Notice("after"), StateChanged(JobState.FINISHED))

    kinds, continuation = [], None
    async for event in servicer.WatchJob(pb.WatchJobRequest(job_id=job), None):
        kinds.append(event.WhichOneof("event"))
        if event.state_changed.state == pb.JOB_STATE_RUNNING:
            mortal_redis.kill()
            continuation = asyncio.create_task(go_on())
    assert kinds == 2 * ["state_changed"] + ["notice", "state_changed"]
    assert event.state_changed.state == pb.JOB_STATE_FINISHED
    assert continuation is not None
    await continuation


@async_test
async def test_a_watch_waits_for_redis_only_for_a_limited_time(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_OUTAGE_S", 0.0)
    gone = JobQueue(connect(RedisAddress(f"unix://{tmp_path}/none.sock")), queue.registry)
    with pytest.raises(Unavailable, match="Redis does not answer"):
        await watched(TrainingServicer(gone, disk_registry(tmp_path / "registry"), tmp_path / "data"), "0")


@pytest.mark.parametrize(
    ("method", "raw", "sentence"),
    [
        # A name that ends in the middle of an emoji, as JavaScript cuts it.
        ("EnqueueJob", b"\x0a\x03\xed\xa0\xbd", "cannot be read"),
        ("GetJob", b"\x0a\x7fx", "cannot be read"),
        ("WatchJob", b"\xff" * 11, "cannot be read"),
        ("CancelJob", b"\x0a\x01\xff", "cannot be read"),
        ("ListJobs", b"\x9a\x06\x01x", "does not know"),
        ("EnqueueJob", b"\x4a\x02..", "name of a run is"),
    ],
)
def test_a_malformed_request_is_one_sentence_with_the_right_code(
    servicer: TrainingServicer, caplog: pytest.LogCaptureFixture, method: str, raw: bytes, sentence: str
) -> None:
    metrics = CollectorRegistry()

    with (
        listening(servicer, CallMetrics(metrics).called) as address,
        grpc.insecure_channel(address) as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{method}")
        call(raw)
    error = raised.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and sentence in str(error.details())
    refused = {"method": method, "code": "invalid_argument"}
    assert metrics.get_sample_value("gptloop_training_calls_total", refused) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@async_test
async def test_a_run_has_the_name_and_the_notes_that_a_client_gave(servicer: TrainingServicer, queue: JobQueue) -> None:
    first = await enqueue(servicer, name="wide", notes="twice the width\nof demo")
    second = await enqueue(servicer)
    assert (first.run, first.notes, first.jobs_ahead) == ("wide", "twice the width\nof demo", 0)
    assert second.run.startswith("demo-") and second.jobs_ahead == 1
    with pytest.raises(AlreadyExists, match="choose another name"):
        await enqueue(servicer, name="wide")
    start(queue, first.id)
    running = (await servicer.GetJob(pb.GetJobRequest(job_id=first.id), None)).job
    assert not running.HasField("jobs_ahead")


@async_test
async def test_a_job_that_no_live_worker_can_do_names_the_one_that_it_waits_for(
    servicer: TrainingServicer, queue: JobQueue
) -> None:
    queue.store.workers.renew("a", Offer())
    queued = await enqueue(servicer, needs="gpu,memory=16G")
    answer = (await servicer.GetJob(pb.GetJobRequest(job_id=queued.id), None)).job
    assert (answer.needs, answer.awaited) == ("gpu,memory=16G", "a worker with a GPU, 16.0 GiB of memory")
    assert (await enqueue(servicer)).awaited == ""
    with pytest.raises(InvalidArgument, match="needs is 'tpu', but must be gpu"):
        await enqueue(servicer, needs="tpu")
