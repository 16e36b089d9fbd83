"""The inference server: wires the parts together and runs them until a signal, or until a part fails."""

import asyncio
import logging

from prometheus_client import CollectorRegistry

from inference_service.admission import Admission
from inference_service.engine.engine import Engine
from inference_service.engine.request import Output
from inference_service.hotload import HotLoader
from inference_service.metrics import InferenceMetrics
from inference_service.servicer import InferenceServicer
from inference_service.settings import METRICS_PORT_VARIABLE, PORT_VARIABLE, Settings
from shared import accelerator
from shared.grpc_server import GrpcServer, Signals
from shared.metrics_page import metrics_page
from shared.pb.inference.v1 import inference_pb2, inference_pb2_grpc
from shared.registry.store import Registry

logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
# So long running streams may go on after the first signal.
_DRAIN_S = 10.0


async def serve(settings: Settings) -> bool:
    """Serves until SIGTERM or SIGINT; whether it ended as asked, and not because a part failed.

    Raises `AlreadyExists` where a port is in use.
    """
    loop = asyncio.get_running_loop()
    signals = Signals()
    engine_failed = asyncio.Event()

    def deliver(outputs: list[Output]) -> None:
        loop.call_soon_threadsafe(servicer.deliver, outputs)

    def fail() -> None:
        loop.call_soon_threadsafe(engine_failed.set)

    collectors = CollectorRegistry()
    metrics = InferenceMetrics(collectors, accelerator.memory)
    registry = Registry(settings.directories.registry)
    server = GrpcServer([SERVICE])
    engine = Engine(settings.slots, deliver, fail)
    versions = HotLoader(registry, engine, settings.resident_versions, metrics, lambda: server.set_serving(True))
    admission = Admission(settings.max_waiting_requests, settings.max_waiting_prompt_tokens, metrics.waiting_requests)
    servicer = InferenceServicer(registry, engine, versions, admission, metrics)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)

    with metrics_page(collectors, settings.host, settings.metrics_port, METRICS_PORT_VARIABLE) as metrics_port:
        port = await server.start(settings.host, settings.port, PORT_VARIABLE)
        logger.info("gRPC on %s:%d, metrics on http://%s:%d/metrics", settings.host, port, settings.host, metrics_port)
        engine.start()
        loading = asyncio.create_task(versions.run(settings.poll_interval_s))
        ends = [loading, asyncio.create_task(signals.asked.wait()), asyncio.create_task(engine_failed.wait())]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            logger.error("loading versions failed", exc_info=loading.exception())
        await server.stop(_DRAIN_S, servicer.cancel_all, signals.forced)
        for task in ends:
            task.cancel()
        await asyncio.wait(ends)
        engine.stop()
    return signals.asked.is_set() and not engine_failed.is_set()
