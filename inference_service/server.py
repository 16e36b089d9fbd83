"""The inference server: builds its parts and runs them until a signal comes or a part fails."""

import asyncio
import gc
import logging
import os
from dataclasses import replace
from functools import partial

from prometheus_client import CollectorRegistry

from inference_service.admission import Admission
from inference_service.client_limits import ClientLimits
from inference_service.codec import Codec
from inference_service.engine.engine import Engine
from inference_service.engine.request import Output
from inference_service.generation import Generations
from inference_service.grpc.admin import AdminServicer
from inference_service.grpc.servicer import InferenceServicer
from inference_service.http.api import api_routes
from inference_service.http.page import page_routes
from inference_service.http.server import HttpServer
from inference_service.metrics import InferenceMetrics
from inference_service.pauses import Pauses
from inference_service.settings import (
    HOST_VARIABLE,
    HTTP_PORT_VARIABLE,
    METRICS_HOST_VARIABLE,
    METRICS_PORT_VARIABLE,
    PORT_VARIABLE,
    PROBE_PORT_VARIABLE,
    Settings,
    device_kind,
    prefill_tokens_on,
    weights_on,
)
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.loader import Loader
from inference_service.versions.manager import VersionManager
from inference_service.versions.residents import Residents
from inference_service.watchdog import Watchdog
from inference_service.write_timeouts import WriteTimeouts
from shared.decoding.decoder import DecoderFactory
from shared.device import accelerator
from shared.device.accelerator import Accelerator, Memory
from shared.device.machine import memory_limit_bytes
from shared.pb.inference.v1 import inference_pb2, inference_pb2_grpc
from shared.service.access.exposure import warn_if_exposed
from shared.service.access.tls import ServerTls
from shared.service.access.token_interceptor import TokenInterceptor
from shared.service.grpc_calls import ENDING
from shared.service.grpc_server import GrpcServer, Signals
from shared.service.listening import Address
from shared.service.metrics_page import metrics_page
from shared.service.settings import to_address

logger = logging.getLogger(__name__)

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
ADMIN_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["ModelAdminService"].full_name
# The engine may take this long to finish its last step.
_LAST_STEP_S = 5.0
_STUCK = "The engine is stuck and the server restarts; try again in a moment."


async def serve(settings: Settings, device: Accelerator) -> bool:
    """Serves until SIGTERM or SIGINT; returns True then, and False if a part failed.

    Raises `AlreadyExists` if a port is in use. If the engine is stuck, the process ends here, with code 1.
    """
    warn_if_exposed(settings.host, HOST_VARIABLE, settings.tls is not None, settings.missing_tokens, settings.insecure)
    tls = ServerTls(settings.tls) if settings.tls else None
    callers = settings.tokens.open()
    loop = asyncio.get_running_loop()
    signals = Signals()
    engine_failed = asyncio.Event()

    def deliver(outputs: list[Output]) -> None:
        loop.call_soon_threadsafe(generations.deliver, outputs)

    def fail() -> None:
        loop.call_soon_threadsafe(engine_failed.set)

    def memory() -> Memory:
        used = accelerator.memory()
        return replace(used, active_bytes=used.active_bytes + decoders.gpu_bytes)

    async def set_health(healthy: bool) -> None:
        metrics.health(healthy)
        await server.set_serving(healthy)

    def give_up(watching: asyncio.Task[None]) -> None:
        if watching.cancelled():
            return
        if (error := watching.exception()) is not None:
            logger.error("watching the engine failed", exc_info=error)
        # The engine may never end a stream again, so there is nothing to wait for.
        engine.close(_STUCK)
        generations.fail_all(_STUCK)
        signals.forced.set()

    collectors = CollectorRegistry()
    registry = settings.directories.open_registry(settings.best_by)
    prefill_tokens = settings.prefill_tokens or prefill_tokens_on(device.backend)
    weights = weights_on(device.backend, settings.weights)
    engine = Engine(settings.slots, prefill_tokens, settings.prefix_cache_mib << 20, deliver, fail)
    decoders = DecoderFactory(settings.slots, settings.threads, device.cache, weights)
    limits = {"resident": memory_limit_bytes()} | ({} if device.backend == "cpu" else {"active": device.memory_bytes})
    metrics = InferenceMetrics(
        collectors, memory, lambda: decoders.compiled_shapes, lambda: engine.active_streams, limits
    )
    if tls:
        metrics.certificate(lambda: tls.current().ends_at)
    guard = TokenInterceptor(callers, clients=[SERVICE], operators=[ADMIN_SERVICE])
    server = GrpcServer([SERVICE, ADMIN_SERVICE], metrics.called, [guard])
    catalogue = Catalogue(registry, device_kind(device.backend, weights), metrics)
    residents = Residents(
        catalogue,
        Loader(registry, catalogue, engine, decoders.make, decoders.prepare),
        limit=settings.resident_versions,
        max_waiting=settings.max_waiting_requests,
        metrics=metrics,
    )
    versions = VersionManager(catalogue, residents, settings.gate_margin)
    admission = Admission(settings.max_waiting_requests, settings.max_waiting_prompt_tokens, metrics.waiting_requests)
    pauses = Pauses()
    write_timeouts = WriteTimeouts(settings.slow_reader_s, pauses)
    codec = Codec()
    client_limits = ClientLimits(settings.slots, settings.client_streams, settings.client_tokens_per_minute, metrics)
    generations = Generations(catalogue, engine, residents, client_limits, admission, codec, metrics, versions.failed)
    servicer = InferenceServicer(generations, catalogue, residents, codec, write_timeouts)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
    admin = AdminServicer(catalogue, versions)
    inference_pb2_grpc.add_ModelAdminServiceServicer_to_server(admin, server.server)
    routes = [
        *api_routes(generations, catalogue, write_timeouts, metrics.ended),
        *page_routes(admin, catalogue, registry, callers),
    ]
    http = HttpServer(routes, settings.http_hosts, settings.http_origins, callers, metrics.answered_over_http, tls)
    watchdog = Watchdog(
        engine, lambda: versions.serving is not None, set_health, settings.stuck_after_s, pauses, write_timeouts
    )

    page = Address(settings.metrics_host, settings.metrics_port, METRICS_HOST_VARIABLE, METRICS_PORT_VARIABLE)
    probe = None
    if settings.probe_port is not None:
        probe = Address(settings.metrics_host, settings.probe_port, METRICS_HOST_VARIABLE, PROBE_PORT_VARIABLE)
    with metrics_page(collectors, page) as metrics_port:
        # Before any call, so that refused versions are refused from the start.
        await catalogue.look()
        # The objects so far stay. To go through them at each garbage collection would delay streams.
        gc.collect()
        gc.freeze()
        port = await server.start(Address(settings.host, settings.port, HOST_VARIABLE, PORT_VARIABLE), tls, probe)
        http_port = http.start(Address(settings.host, settings.http_port, HOST_VARIABLE, HTTP_PORT_VARIABLE))
        logger.info(
            "page on %s://%s/, gRPC on %s, metrics on http://%s/metrics",
            "https" if tls else "http",
            to_address(settings.host, http_port),
            to_address(settings.host, port),
            to_address(settings.metrics_host, metrics_port),
        )
        engine.start()
        loading = asyncio.create_task(versions.run(settings.poll_interval_s))
        watching = asyncio.create_task(watchdog.run())
        watching.add_done_callback(give_up)
        asked = asyncio.create_task(signals.asked.wait())
        failing = asyncio.create_task(engine_failed.wait())
        parts = [loading, watching, asked, failing]
        await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            logger.error("loading versions failed", exc_info=loading.exception())
        # An engine that failed has ended its streams already.
        drain_s = 0.0 if failing.done() else settings.drain_s
        await asyncio.gather(
            http.stop(drain_s, signals.forced),
            server.stop(drain_s, signals.forced, partial(generations.fail_all, ENDING)),
        )
        generations.fail_all(ENDING)
        await http.close()
        ended_as_asked = not (loading.done() or watching.done() or failing.done())
        for part in parts:
            part.cancel()
        await asyncio.wait(parts)
        if not await asyncio.to_thread(engine.stop, _LAST_STEP_S):
            logger.error("the engine's last step does not end, so the process ends without it")
            logging.shutdown()
            os._exit(1)
    return ended_as_asked
