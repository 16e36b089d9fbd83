"""The inference server as a process, for tests."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from inference_service.client import InferenceClient
from inference_service.client.completion import Event
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.service.access.credentials import PLAIN
from shared.service.client_channel import open_channel
from tests.registries import disk_registry
from tests.waiting import HANG_S, wait_until

ROOT = Path(__file__).parent.parent.parent

# Options of a client that buffers little unread data.
SMALL_WINDOW = [("grpc.enable_http_proxy", 0), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16384)]

SERVE = ("-m", "inference_service", "serve")

# A server whose decoder follows orders from a file in its folder.
BREAKABLE = (
    "-c",
    """
import os, sys, threading, time
from pathlib import Path
from inference_service.__main__ import app
from shared.service import cli

orders = Path(os.environ["GPTLOOP_VAR"]) / "orders"

def break_decoder():
    while not hasattr(sys.modules.get("shared.decoding.cpu.decoder"), "CpuDecoder"):
        time.sleep(0.01)
    decoder = sys.modules["shared.decoding.cpu.decoder"].CpuDecoder
    forward = decoder.forward
    def breakable(self, spans):
        order = orders.read_text() if orders.exists() else ""
        if order in ("fail once", "pause"):
            orders.unlink()
        if order == "pause":
            time.sleep(3)
        if order == "hold after one":
            orders.write_text("hold")
        while order == "hold" and orders.read_text() == "hold":
            time.sleep(0.01)
        if order == "hang":
            threading.Event().wait()
        if order in ("fail once", "fail"):
            raise RuntimeError("the device is gone")
        return forward(self, spans)
    decoder.forward = breakable

threading.Thread(target=break_decoder, daemon=True).start()
sys.argv = ["inference_service", "serve"]
cli.run(app)
""",
)


class Server:
    """A server process on ports that the system chooses. Several may share a folder; a new one has no versions."""

    def __init__(self, var: Path, command: Sequence[str] = SERVE, **settings: str) -> None:
        var.mkdir(exist_ok=True)
        # Those of its clients; a test may set others.
        self.credentials = PLAIN
        self.var = var
        # Reuses the kernels that earlier tests compiled.
        (ROOT / ".pytest_cache" / "server").mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            (var / "cache").symlink_to(ROOT / ".pytest_cache" / "server")
        self.registry = disk_registry(var / "registry")
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={
                **os.environ,
                "GPTLOOP_VAR": str(var),
                "GPTLOOP_INFERENCE_PORT": "0",
                "GPTLOOP_INFERENCE_METRICS_PORT": "0",
                "GPTLOOP_INFERENCE_HTTP_PORT": "0",
                "GPTLOOP_INFERENCE_POLL_INTERVAL_S": "0.05",
                # Random models claim to improve on each other, but do not.
                "GPTLOOP_INFERENCE_GATE_MARGIN": "100",
                **settings,
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or []))
        self._reader.start()
        wait_until(lambda: self._address() is not None or self.process.poll() is not None)
        found = self._address()
        assert found is not None, self.lines
        self.page_url, self.address, self.metrics_url = found.groups()

    def _address(self) -> re.Match[str] | None:
        return re.search(r'page on (\S+), gRPC on (\S+), metrics on ([^\s"]+)', "".join(self.lines.copy()))

    def client(self) -> InferenceClient:
        return InferenceClient(self.address, credentials=self.credentials)

    def health(self, service: str = "") -> int:
        with open_channel(self.address, self.credentials) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)

    def serves(self) -> bool:
        return self.health() == health_pb2.HealthCheckResponse.SERVING

    def metrics(self) -> dict[tuple[str, ...], float]:
        with urllib.request.urlopen(self.metrics_url, timeout=HANG_S) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    def order(self, what: str) -> float:
        """Gives the decoder of a breakable server an order for its next step; returns the time of the order."""
        path = self.var / "orders"
        path.with_suffix(".new").write_text(what)
        path.with_suffix(".new").rename(path)
        return time.monotonic()

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(HANG_S)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, pb.Delta))
