"""The gRPC TrainingService and its metrics page."""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from itertools import islice
from pathlib import Path
from typing import Any

from shared.errors import GptloopError, InvalidArgument, Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from shared.registry.identity import registry_id
from shared.registry.store import Registry
from shared.service.grpc_server import GrpcServer, Signals
from shared.service.listening import Address
from shared.service.metrics_page import metrics_page
from trainer_service.jobs.events import StateChanged
from trainer_service.jobs.holds import enqueue
from trainer_service.jobs.kinds import complete
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.reachable import Outage
from trainer_service.metrics import CallMetrics, make_metrics
from trainer_service.redis_server import connect
from trainer_service.settings import TrainerSettings
from trainer_service.translate import STATES, event_to_pb, job_to_pb, kinds_from_pb, request_from_pb

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"].full_name

_DEFAULT_PAGE_SIZE = 50
_MAX_PAGE_SIZE = 1000
# Clients take messages of 4 MiB by default.
_MAX_PAGE_BYTES = 1 << 20
_WATCH_INTERVAL_S = 0.25
_HEALTH_INTERVAL_S = 1.0
# A watch waits so long for a Redis that is gone, for it could only begin again from the first event.
_OUTAGE_S = 60.0
_DRAIN_S = 2.0


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Answers from the queue; every call to Redis runs on a thread, so that one slow answer holds up no other."""

    def __init__(self, queue: JobQueue, registry: Registry) -> None:
        self._queue = queue
        self._registry = registry

    async def EnqueueJob(self, request: pb.EnqueueJobRequest, context: Any) -> pb.EnqueueJobResponse:  # noqa: N802
        """Checks a request, completes it and puts it on the queue."""
        wanted = request_from_pb(request)
        spec = await asyncio.to_thread(complete, wanted, self._registry)
        record = await asyncio.to_thread(enqueue, self._queue, self._registry, wanted.kind, spec, wanted.after)
        live_workers = await asyncio.to_thread(self._queue.live_workers)
        return pb.EnqueueJobResponse(job=job_to_pb(record), live_workers=live_workers)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:  # noqa: N802
        """A job as it stands."""
        return pb.GetJobResponse(job=job_to_pb(await asyncio.to_thread(self._queue.get, request.job_id)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:  # noqa: N802
        """A page of jobs, the newest first."""
        states = [state for state, number in STATES.items() if number in request.states]
        if len(states) != len(set(request.states)):
            raise InvalidArgument("states holds one that is not a state of a job.")
        size = request.page_size or _DEFAULT_PAGE_SIZE
        if not 1 <= size <= _MAX_PAGE_SIZE:
            raise InvalidArgument(f"page_size is {size}, but must be from 1 to {_MAX_PAGE_SIZE}.")
        kinds = kinds_from_pb(request.kinds)
        before = _read_page_token(request.page_token)
        records = await asyncio.to_thread(lambda: list(islice(self._queue.jobs(states, kinds, before), size + 1)))
        jobs: list[pb.Job] = []
        size_bytes = 0
        for record in records[:size]:
            job = job_to_pb(record)
            size_bytes += job.ByteSize()
            if jobs and size_bytes > _MAX_PAGE_BYTES:
                break
            jobs.append(job)
        token = _page_token(records[len(jobs) - 1].place) if len(records) > len(jobs) else ""
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Every event of a job until it ends, also after a while in which Redis was gone."""
        last, outage = "0", Outage(_OUTAGE_S)
        while True:
            try:
                # Asked before, so that nothing can be told after; raises where the job is gone.
                ended = (await asyncio.to_thread(self._queue.get, request.job_id)).state.is_final
                # Without waiting in Redis: a thread is held for a moment only, however many watch.
                batch = await asyncio.to_thread(self._queue.read_events, request.job_id, last)
                outage.end()
            except Unavailable:
                if not outage.may_retry():
                    raise
                await asyncio.sleep(_HEALTH_INTERVAL_S)
                continue
            for event_id, timed in batch:
                last = event_id
                yield event_to_pb(timed)
                if isinstance(timed.event, StateChanged) and timed.event.state.is_final:
                    return
            if not batch:
                if ended:
                    return
                await asyncio.sleep(_WATCH_INTERVAL_S)

    async def CancelJob(self, request: pb.CancelJobRequest, context: Any) -> pb.CancelJobResponse:  # noqa: N802
        """Asks a job to end."""
        return pb.CancelJobResponse(job=job_to_pb(await asyncio.to_thread(self._queue.cancel, request.job_id)))


async def serve(settings: TrainerSettings) -> None:
    """Serves until SIGTERM or SIGINT. Health is SERVING while Redis answers."""
    root = settings.directories.registry
    queue = JobQueue(connect(settings.redis_url), registry_id(root))
    signals = Signals()
    metrics = make_metrics(queue)
    server = GrpcServer([SERVICE], ended=CallMetrics(metrics).called)
    training_pb2_grpc.add_TrainingServiceServicer_to_server(TrainingServicer(queue, Registry(root)), server.server)
    host = settings.host
    page = Address(host, settings.metrics_port, "GPTLOOP_TRAINER_HOST", "GPTLOOP_TRAINER_METRICS_PORT")
    with metrics_page(metrics, page) as metrics_port:
        port = await server.start(Address(host, settings.port, "GPTLOOP_TRAINER_HOST", "GPTLOOP_TRAINER_PORT"))
        logger.info("gRPC on %s:%d, metrics on http://%s:%d/metrics", host, port, host, metrics_port)
        health = asyncio.create_task(_follow_redis(server, queue, root, signals))
        await signals.asked.wait()
        health.cancel()
        await server.stop(_DRAIN_S, signals.forced)


async def _follow_redis(server: GrpcServer, queue: JobQueue, root: Path, signals: Signals) -> None:
    while True:
        try:
            await asyncio.to_thread(queue.live_workers)
            await server.set_serving(True)
            if await asyncio.to_thread(registry_id, root) != queue.registry:
                logger.error(
                    "%s holds another registry by now: this process ends, and is for the new one next time", root
                )
                signals.asked.set()
        except Unavailable:
            await server.set_serving(False)
        except GptloopError as error:
            logger.error("%s", error)
        await asyncio.sleep(_HEALTH_INTERVAL_S)


def _page_token(place: int) -> str:
    return base64.urlsafe_b64encode(str(place).encode()).decode()


def _read_page_token(token: str) -> int | None:
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
    except ValueError:
        text = ""
    if not text.isdecimal() or len(text) > 18:
        raise InvalidArgument("page_token is not one that ListJobs gave.")
    return int(text)
