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
from shared.registry.registry import Registry
from shared.registry.store import Store
from shared.service.access.exposure import warn_if_exposed
from shared.service.access.tls import ServerTls
from shared.service.access.token_interceptor import TokenInterceptor
from shared.service.grpc_server import GrpcServer, Signals
from shared.service.listening import Address
from shared.service.metrics_page import metrics_page
from shared.service.settings import to_address
from trainer_service.jobs.events import StateChanged
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import JobRequest
from trainer_service.jobs.submit import on_this_machine, submit
from trainer_service.metrics import CallMetrics, make_metrics, show_certificate
from trainer_service.redis_client import Outage, connect
from trainer_service.settings import (
    HOST_VARIABLE,
    METRICS_HOST_VARIABLE,
    METRICS_PORT_VARIABLE,
    PORT_VARIABLE,
    PROBE_PORT_VARIABLE,
    TrainerSettings,
)
from trainer_service.translate import STATES, event_to_pb, job_to_pb, kinds_from_pb, request_from_pb

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["TrainingService"].full_name

_DEFAULT_PAGE_SIZE = 50
_MAX_PAGE_SIZE = 1000
# Clients take messages of 4 MiB by default.
_MAX_PAGE_BYTES = 1 << 20
_WATCH_INTERVAL_S = 0.25
_HEALTH_INTERVAL_S = 1.0
# How long a watch waits for Redis: a client that watches again starts from the first event.
_OUTAGE_S = 60.0
_DRAIN_S = 2.0


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Answers from the queue. Every call to Redis runs on a thread, so that a slow answer delays no other call."""

    def __init__(self, queue: JobQueue, registry: Registry, data: Path) -> None:
        self._queue = queue
        self._registry = registry
        self._data = data

    async def EnqueueJob(self, request: pb.EnqueueJobRequest, context: Any) -> pb.EnqueueJobResponse:  # noqa: N802
        """Submits a job."""
        wanted = request_from_pb(request)
        record = await asyncio.to_thread(self._submit, wanted)
        live_workers = await asyncio.to_thread(self._queue.store.workers.count)
        return pb.EnqueueJobResponse(job=job_to_pb(record), live_workers=live_workers)

    def _submit(self, wanted: JobRequest) -> JobRecord:
        spec = on_this_machine(wanted.resolve(self._registry), wanted.after, self._data, self._queue.store)
        return submit(spec, self._queue, self._registry, wanted.after)

    async def GetJob(self, request: pb.GetJobRequest, context: Any) -> pb.GetJobResponse:  # noqa: N802
        """Returns the current state of a job."""
        return pb.GetJobResponse(job=job_to_pb(await asyncio.to_thread(self._queue.store.get, request.job_id)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: Any) -> pb.ListJobsResponse:  # noqa: N802
        """Returns a page of jobs, the newest first."""
        states = [state for state, number in STATES.items() if number in request.states]
        if len(states) != len(set(request.states)):
            raise InvalidArgument("states contains a number that is not a state of a job.")
        size = request.page_size or _DEFAULT_PAGE_SIZE
        if not 1 <= size <= _MAX_PAGE_SIZE:
            raise InvalidArgument(f"page_size is {size}, but must be from 1 to {_MAX_PAGE_SIZE}.")
        kinds = kinds_from_pb(request.kinds)
        before = _read_page_token(request.page_token)
        records = await asyncio.to_thread(lambda: list(islice(self._queue.store.jobs(states, kinds, before), size + 1)))
        jobs: list[pb.Job] = []
        size_bytes = 0
        for record in records[:size]:
            job = job_to_pb(record)
            size_bytes += job.ByteSize()
            if jobs and size_bytes > _MAX_PAGE_BYTES:
                break
            jobs.append(job)
        token = _page_token(records[len(jobs) - 1].ticket) if len(records) > len(jobs) else ""
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        """Streams every event of a job until it ends, and continues after an outage of Redis."""
        last, outage = "0", Outage(_OUTAGE_S)
        while True:
            try:
                # Read first, so that no event can follow if the job has ended; raises if the job has expired.
                ended = (await asyncio.to_thread(self._queue.store.get, request.job_id)).state.is_final
                # Does not wait in Redis, so that many watches need few threads.
                batch = await asyncio.to_thread(self._queue.store.read_events, request.job_id, last)
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
        """Cancels a job."""
        return pb.CancelJobResponse(job=job_to_pb(await asyncio.to_thread(self._queue.cancel, request.job_id)))


async def serve(settings: TrainerSettings) -> None:
    """Serves until SIGTERM or SIGINT. The health is SERVING while Redis answers."""
    host = settings.host
    warn_if_exposed(host, HOST_VARIABLE, settings.tls is not None, settings.missing_tokens, settings.insecure)
    tls = ServerTls(settings.tls) if settings.tls else None
    callers = settings.tokens.open()
    registry = settings.open_registry()
    queue = JobQueue(connect(settings.redis), registry.store.id())
    signals = Signals()
    metrics = make_metrics(queue, registry)
    if tls:
        show_certificate(metrics, lambda: tls.current().ends_at)
    guard = TokenInterceptor(callers, clients=[], operators=[SERVICE])
    server = GrpcServer([SERVICE], CallMetrics(metrics).called, [guard])
    training_pb2_grpc.add_TrainingServiceServicer_to_server(
        TrainingServicer(queue, registry, settings.directories.data), server.server
    )
    page = Address(settings.metrics_host, settings.metrics_port, METRICS_HOST_VARIABLE, METRICS_PORT_VARIABLE)
    probe = None
    if settings.probe_port is not None:
        probe = Address(settings.metrics_host, settings.probe_port, METRICS_HOST_VARIABLE, PROBE_PORT_VARIABLE)
    with metrics_page(metrics, page) as metrics_port:
        port = await server.start(Address(host, settings.port, HOST_VARIABLE, PORT_VARIABLE), tls, probe)
        logger.info(
            "gRPC on %s, metrics on http://%s/metrics",
            to_address(host, port),
            to_address(settings.metrics_host, metrics_port),
        )
        health = asyncio.create_task(_follow_redis(server, queue, registry.store, signals))
        await signals.asked.wait()
        health.cancel()
        await server.stop(_DRAIN_S, signals.forced)


async def _follow_redis(server: GrpcServer, queue: JobQueue, store: Store, signals: Signals) -> None:
    problem = ""
    while True:
        try:
            await asyncio.to_thread(queue.store.workers.count)
            await server.set_serving(True)
            if await asyncio.to_thread(store.id) != queue.registry:
                logger.error(
                    "%s contains another registry now: this process ends, and its next start uses that one",
                    store.address,
                )
                signals.asked.set()
            problem = ""
        except Unavailable:
            await server.set_serving(False)
        except GptloopError as error:
            if str(error) != problem:
                logger.error("%s", error)
            problem = str(error)
        await asyncio.sleep(_HEALTH_INTERVAL_S)


def _page_token(ticket: int) -> str:
    return base64.urlsafe_b64encode(str(ticket).encode()).decode()


def _read_page_token(token: str) -> int | None:
    if not token:
        return None
    try:
        text = base64.urlsafe_b64decode(token.encode()).decode()
    except ValueError:
        text = ""
    if not text.isdecimal() or len(text) > 18:
        raise InvalidArgument("page_token is not one that ListJobs returned.")
    return int(text)
