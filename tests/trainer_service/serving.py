"""The TrainingService behind a port, and its answers without a network between."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from shared.pb.training.v1 import training_pb2 as pb
from shared.pb.training.v1 import training_pb2_grpc
from shared.service.grpc_calls import Ended
from shared.service.grpc_server import GrpcServer
from shared.service.listening import Address
from tests.waiting import HANG_S
from trainer_service.server import SERVICE, TrainingServicer


async def watched(servicer: TrainingServicer, job: str) -> list[pb.WatchJobResponse]:
    """Watches a job to its end."""
    return [event async for event in servicer.WatchJob(pb.WatchJobRequest(job_id=job), None)]


@contextmanager
def listening(servicer: TrainingServicer, ended: Ended = lambda *_: None) -> Iterator[str]:
    """Serves calls on a thread of its own, and yields the address; `ended` is called when a call has ended."""
    address: Future[str] = Future()
    ending = threading.Event()

    async def serve() -> None:
        server = GrpcServer([SERVICE], ended=ended)
        training_pb2_grpc.add_TrainingServiceServicer_to_server(servicer, server.server)
        address.set_result(f"127.0.0.1:{await server.start(Address('127.0.0.1', 0, 'HOST', 'PORT'))}")
        await asyncio.to_thread(ending.wait)
        await server.stop(0.0, asyncio.Event())

    with ThreadPoolExecutor(1) as thread:
        serving = thread.submit(asyncio.run, serve())
        try:
            yield address.result(HANG_S)
        finally:
            ending.set()
            serving.result()
