"""The TrainingService's answers from a real Redis, without a network between."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

from shared.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from shared.registry.store import Registry
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from tests.jobs import report, start, training
from tests.redis_process import RedisServer
from trainer_service import server as server_module
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.metrics import CallMetrics
from trainer_service.redis_server import connect
from trainer_service.server import SERVICE, TrainingServicer


@pytest.fixture
def servicer(queue: JobQueue, tmp_path: Path) -> TrainingServicer:
    return TrainingServicer(queue, Registry(tmp_path / "registry"))


def enqueue(servicer: TrainingServicer, **values: object) -> pb.Job:
    request = pb.EnqueueJobRequest(**values)  # type: ignore[arg-type]
    return asyncio.run(servicer.EnqueueJob(request, None)).job


def watch(servicer: TrainingServicer, job: str) -> list[pb.WatchJobResponse]:
    async def collect() -> list[pb.WatchJobResponse]:
        return [event async for event in servicer.WatchJob(pb.WatchJobRequest(job_id=job), None)]

    return asyncio.run(asyncio.wait_for(collect(), 20))


def test_a_watch_receives_every_event_of_a_job(servicer: TrainingServicer, queue: JobQueue) -> None:
    job = enqueue(servicer).id
    queue.store.report(job, 1, [TimedEvent(Notice(str(number))) for number in range(2500)])
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    events = watch(servicer, job)
    assert [event.notice.text for event in events[1:-1]] == [str(number) for number in range(2500)]
    assert events[-1].state_changed.state == pb.JOB_STATE_FINISHED


def test_a_watch_of_an_ended_job_without_events_ends(servicer: TrainingServicer, queue: JobQueue, redis: Redis) -> None:
    job = enqueue(servicer).id
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    redis.delete(queue.store.keys.events(job))
    assert watch(servicer, job) == []
    redis.delete(queue.store.keys.job(job))
    with pytest.raises(NotFound):
        watch(servicer, job)


def test_jobs_are_listed_in_pages_by_state_and_kind(servicer: TrainingServicer, queue: JobQueue) -> None:
    jobs = [enqueue(servicer).id for _ in range(5)]
    prepared = enqueue(servicer, kind=pb.JOB_KIND_PREPARE, after=[jobs[0]])
    assert (prepared.kind, list(prepared.after), prepared.attempt) == (pb.JOB_KIND_PREPARE, [jobs[0]], 1)
    queue.cancel(jobs[2])

    def page(**values: object) -> pb.ListJobsResponse:
        request = pb.ListJobsRequest(**values)  # type: ignore[arg-type]
        return asyncio.run(servicer.ListJobs(request, None))

    found, token = [], ""
    while True:
        answer = page(page_size=2, page_token=token, states=[pb.JOB_STATE_QUEUED], kinds=[pb.JOB_KIND_TRAIN])
        found += [job.id for job in answer.jobs]
        if not (token := answer.next_page_token):
            break
    assert found == [jobs[4], jobs[3], jobs[1], jobs[0]]
    assert [job.id for job in page(kinds=[pb.JOB_KIND_PREPARE]).jobs] == [prepared.id]
    for wrong in ({"page_token": "bmFu"}, {"page_token": "x"}, {"page_size": -1}, {"states": [99]}, {"kinds": [99]}):
        with pytest.raises(InvalidArgument):
            page(**wrong)


def test_invalid_requests_are_rejected(servicer: TrainingServicer) -> None:
    for wrong in ({"kind": 99}, {"version": "3"}, {"kind": pb.JOB_KIND_EVALUATE, "preset": "demo"}):
        with pytest.raises(InvalidArgument):
            enqueue(servicer, **wrong)
    with pytest.raises(NotFound):
        enqueue(servicer, after=["x"])


def test_a_watch_continues_after_redis_was_killed_and_restarted(mortal_redis: RedisServer, tmp_path: Path) -> None:
    queue = JobQueue(mortal_redis.connect(), "one")
    servicer = TrainingServicer(queue, Registry(tmp_path / "registry"))
    job = queue.enqueue(training(tmp_path)).id
    start(queue, job)

    async def body() -> list[pb.WatchJobResponse]:
        events, finished = [], False
        async for event in servicer.WatchJob(pb.WatchJobRequest(job_id=job), None):
            events.append(event)
            if event.state_changed.state == pb.JOB_STATE_RUNNING:
                mortal_redis.kill()
                # The watch meets it while it is gone.
                asyncio.get_running_loop().call_later(0.5, restart.set)
                asyncio.create_task(go_on())  # noqa: RUF006
            finished = event.state_changed.state == pb.JOB_STATE_FINISHED
        assert finished
        return events

    restart = asyncio.Event()

    async def go_on() -> None:
        await restart.wait()
        await asyncio.to_thread(mortal_redis.start)
        await asyncio.to_thread(report, queue, job, Notice("after"), StateChanged(JobState.FINISHED))

    events = asyncio.run(asyncio.wait_for(body(), 60))
    assert [event.WhichOneof("event") for event in events] == 2 * ["state_changed"] + ["notice", "state_changed"]


def test_a_watch_waits_for_redis_only_for_a_limited_time(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_OUTAGE_S", 0.0)
    gone = JobQueue(connect(f"unix://{tmp_path}/none.sock"), queue.registry)
    with pytest.raises(Unavailable, match="Redis does not answer"):
        watch(TrainingServicer(gone, Registry(tmp_path / "registry")), "0")


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

    async def body() -> grpc.aio.AioRpcError:
        server = GrpcServer([SERVICE], ended=CallMetrics(metrics).called)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server.server)
        port = await server.start(Address("127.0.0.1", 0, "HOST", "PORT"))
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as insecure:
                channel: Any = insecure
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await channel.unary_unary(f"/{SERVICE}/{method}")(raw)
                return refused.value
        finally:
            await server.stop(0.0, asyncio.Event())

    error = asyncio.run(asyncio.wait_for(body(), 60))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and sentence in str(error.details())
    refused = {"method": method, "code": "invalid_argument"}
    assert metrics.get_sample_value("gptloop_training_calls_total", refused) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_has_the_name_and_the_notes_that_a_client_gave(servicer: TrainingServicer, queue: JobQueue) -> None:
    first = enqueue(servicer, name="wide", notes="twice the width\nof demo")
    second = enqueue(servicer)
    assert (first.run, first.notes, first.jobs_ahead) == ("wide", "twice the width\nof demo", 0)
    assert second.run.startswith("demo-") and second.jobs_ahead == 1
    with pytest.raises(AlreadyExists, match="choose another name"):
        enqueue(servicer, name="wide")
    start(queue, first.id)
    running = asyncio.run(servicer.GetJob(pb.GetJobRequest(job_id=first.id), None)).job
    assert not running.HasField("jobs_ahead")
