"""The TrainingService's answers from a real Redis, without a network between."""

import asyncio
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import InvalidArgument, NotFound
from shared.pb.training.v1 import training_pb2 as pb
from shared.registry.store import Registry
from trainer_service.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.queue import JobQueue
from trainer_service.server import TrainingServicer


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


def test_everything_that_a_job_told_is_watched_to_its_end(servicer: TrainingServicer, queue: JobQueue) -> None:
    job = enqueue(servicer).id
    queue.tell(job, 1, [TimedEvent(Notice(str(number))) for number in range(2500)])
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    events = watch(servicer, job)
    assert [event.notice.text for event in events[1:-1]] == [str(number) for number in range(2500)]
    assert events[-1].state_changed.state == pb.JOB_STATE_FINISHED


def test_watching_ends_where_nothing_can_come_any_more(
    servicer: TrainingServicer, queue: JobQueue, redis: Redis
) -> None:
    job = enqueue(servicer).id
    queue.tell(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    redis.delete(queue.keys.events(job))
    assert watch(servicer, job) == []
    redis.delete(queue.keys.job(job))
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


def test_what_cannot_be_done_is_refused(servicer: TrainingServicer) -> None:
    for wrong in ({"kind": 99}, {"version": "3"}, {"kind": pb.JOB_KIND_EVALUATE, "preset": "demo"}):
        with pytest.raises(InvalidArgument):
            enqueue(servicer, **wrong)
    with pytest.raises(NotFound):
        enqueue(servicer, after=["x"])
