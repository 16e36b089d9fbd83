"""Runs the real inference server in another process during a measurement."""

import http.client
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from deploy.ports import free_ports
from shared.errors import Unavailable
from tests.benchmarks.checkpoint import Checkpoint
from tests.benchmarks.setup import Endpoint
from tests.benchmarks.side_by_side import ROOT

HOST = "127.0.0.1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0


class Server:
    """Serves a checkpoint as a context manager; the server's output goes to `log`.

    The server has its own session, so that Ctrl-C reaches only the measuring process, which then ends the server.
    Raises `Unavailable` if the server does not start.
    """

    def __init__(self, checkpoint: Checkpoint, *, slots: int, threads: int, log: Path) -> None:
        ports = free_ports()
        self.endpoint = Endpoint(
            f"{HOST}:{ports.inference}", f"http://{HOST}:{ports.inference_http}", ports.inference_metrics
        )
        self._log = log
        kept = "GPTLOOP_INFERENCE_WEIGHTS"
        inherited = {
            name: value for name, value in os.environ.items() if name == kept or not name.startswith("GPTLOOP_")
        }
        self._environment = inherited | {
            "GPTLOOP_VAR": str(checkpoint.directories.var),
            "GPTLOOP_INFERENCE_HOST": HOST,
            **ports.to_environment(),
            "GPTLOOP_INFERENCE_SLOTS": str(slots),
            "GPTLOOP_INFERENCE_THREADS": str(threads),
        }

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "inference_service", "serve"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_serving()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Terminates the process, and kills it if it does not end in time."""
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_until_serving(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        with grpc.insecure_channel(self.endpoint.address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while not _is_serving(health):
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    log = self._log.read_text(encoding="utf-8", errors="replace")
                    raise Unavailable(f"The inference server did not start. Its output:\n{log}")
                time.sleep(0.1)


def resident_bytes(metrics_port: int) -> int:
    """Reads the resident memory of the server's process from its metrics page."""
    connection = http.client.HTTPConnection(HOST, metrics_port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    finally:
        connection.close()
    return next(
        int(sample.value)
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "gptloop_inference_memory_bytes" and sample.labels["kind"] == "resident"
    )


def _is_serving(health: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=1.0)  # type: ignore[attr-defined]
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
