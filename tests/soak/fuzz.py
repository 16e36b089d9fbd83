"""Feeds odd inputs to every edge: calls over gRPC and HTTP, connections, files, and what Redis holds.

`python -m tests.soak.fuzz --minutes 6`
"""

import contextlib
import logging
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import grpc
import httpx
import typer

from shared.errors import GptloopError
from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2
from shared.service.lists import print_rows
from tests.fuzzers.area import CALL_S, Area, read_lines, resident_kib
from tests.fuzzers.calls import try_connection, try_grpc, try_http
from tests.fuzzers.files import try_ledger, try_registry, try_text, try_tokens, try_version
from tests.fuzzers.redis import Trainer, check_redis, try_password, try_redis
from tests.fuzzers.registry import choose, registry_of
from tests.fuzzers.secured import GoodClients, SecuredTarget, read_log, try_handshake, try_live_tokens, try_pem
from tests.inference_service.process import Server
from tests.mutations import odd_file
from tests.registries import root_of
from tests.waiting import wait_until

# The first part of the time of each edge warms its process up; then the most memory that it has may grow by this much.
# Only peaks can be compared: broken connections with TLS leave garbage, up to 100 MiB until it is collected.
_WARM = 0.5
_MEMORY_LIMIT_KIB = 32 << 10


class Target:
    """A live inference server, and the checks that it still answers."""

    def __init__(self, folder: Path) -> None:
        folder.joinpath("var").mkdir()
        self.registry = registry_of(folder / "var")
        self.server = Server(
            folder / "var",
            GPTLOOP_INFERENCE_SLOTS="4",
            GPTLOOP_INFERENCE_MAX_WAITING_REQUESTS="64",
            GPTLOOP_INFERENCE_POLL_INTERVAL_S="0.02",
        )
        self.http = httpx.Client()
        wait_until(self.server.serves)

    def answers(self) -> bool:
        """Whether a good request is answered over gRPC and HTTP."""
        try:
            with self.server.client() as client:
                client.complete("Once", max_tokens=3, timeout_s=CALL_S)
            return httpx.get(f"{self.server.page_url}v1/models", timeout=CALL_S).status_code == 200
        except (GptloopError, httpx.HTTPError):
            return False

    def check(self, area: Area) -> None:
        """Keeps whether the server does not answer, and what its log says of a mistake."""
        if self.server.process.poll() is not None:
            area.fell("the server ended", self.server.lines[-40:])
        elif not self.answers():
            area.fell("the server does not answer a good request")
        read_lines(area, self.server.lines.copy())


def try_live_file(rng: random.Random, area: Area, target: Target) -> None:
    """Changes a file of the registry of a live server, and asks for pages that need it."""
    kind, path = choose(rng, root_of(target.registry))
    before = path.read_bytes()
    path.write_bytes(odd_file(rng, before))
    area.tried(kind)
    with contextlib.suppress(httpx.HTTPError):
        for each in ("api/runs", "api/versions", "v1/models", "api/runs/taught"):
            answer = target.http.get(f"{target.server.page_url}{each}", timeout=CALL_S)
            if answer.status_code >= 500 and answer.status_code != 503:
                area.fell(f"GET {each} {answer.status_code}", (path.name, path.read_bytes()))
    # The server looks at the registry in the meantime.
    time.sleep(0.04)
    path.write_bytes(before)


@dataclass(frozen=True)
class Edge:
    """An edge: its share of the time, a step, the check afterwards, and the process whose memory is judged."""

    area: Area
    share: float
    step: Callable[[Area], object]
    check: Callable[[Area], object] = lambda area: None
    pid: int | None = None

    def run(self, seconds: float) -> None:
        """Repeats the step for a time, and checks."""
        begin = time.monotonic()
        memory, warm = self._repeat(begin + _WARM * seconds), self.area.inputs
        grown = self._repeat(begin + seconds) - memory
        self.check(self.area)
        if grown > _MEMORY_LIMIT_KIB:
            self.area.fell(f"the memory grew by {grown} KiB after {warm} inputs")
        print(
            f"{self.area.name}: {self.area.inputs} inputs in {time.monotonic() - begin:.0f} s, "
            f"{self.area.inputs - warm} of them after warm-up; memory {grown:+} KiB",
            flush=True,
        )

    def _repeat(self, end: float) -> int:
        """Repeats the step until a time; returns the most memory that the process had, in KiB."""
        most = 0
        while time.monotonic() < end:
            self.step(self.area)
            if self.pid is not None:
                most = max(most, resident_kib(self.pid))
        return most


def main(
    minutes: Annotated[float, typer.Option(min=0.01)] = 6.0,
    seed: int = 0,
    only: str = "",
) -> None:
    """Feeds odd inputs to every edge; exits with 1 if something fell."""
    rng, begin = random.Random(seed), time.monotonic()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        kept: list[socket.socket] = []
        var = folder / "disk"
        registry_of(var)
        os.environ["GPTLOOP_VAR"] = str(var)
        (folder / "plain").mkdir()
        target = Target(folder / "plain")
        ends.callback(target.server.end)
        secured = SecuredTarget(folder / "secured")
        ends.callback(secured.server.end)
        trainer = Trainer(folder / "trainer")
        ends.callback(trainer.end)
        channel = grpc.insecure_channel(target.server.address, options=[("grpc.enable_http_proxy", 0)])
        ports = [int(target.server.address.rpartition(":")[2]), httpx.URL(target.server.page_url).port or 80]
        plain, tls = target.server.process.pid, secured.server.process.pid
        trainer_pid = trainer.processes["serve"].pid

        def check_tls(area: Area) -> None:
            read_log(area, secured)

        edges = [
            Edge(
                Area("protobuf to the inference server"),
                1.0,
                lambda a: try_grpc(rng, a, channel, inference_pb2),
                target.check,
                plain,
            ),
            Edge(
                Area("JSON over HTTP"),
                1.0,
                lambda a: try_http(rng, a, target.http, target.server.page_url),
                target.check,
                plain,
            ),
            Edge(
                Area("bytes to the gRPC port"),
                0.7,
                lambda a: try_connection(rng, a, ports[0], kept),
                target.check,
                plain,
            ),
            Edge(
                Area("bytes to the HTTP port"),
                0.7,
                lambda a: try_connection(rng, a, ports[1], kept),
                target.check,
                plain,
            ),
            Edge(Area("files under a live server"), 1.5, lambda a: try_live_file(rng, a, target), target.check, plain),
            Edge(Area("TLS ports"), 3.0, lambda a: try_handshake(rng, a, secured, kept), check_tls, tls),
            Edge(Area("files of TLS under a live server"), 1.0, lambda a: try_pem(rng, a, secured), check_tls, tls),
            Edge(
                Area("files of tokens under a live server"),
                0.7,
                lambda a: try_live_tokens(rng, a, secured),
                check_tls,
                tls,
            ),
            Edge(Area("files read by commands"), 1.2, lambda a: try_registry(rng, a, var)),
            Edge(Area("files of a version"), 1.0, lambda a: try_version(rng, a, var)),
            Edge(Area("files of tokens"), 0.3, lambda a: try_tokens(rng, a, var)),
            Edge(Area("ledgers of teachers"), 0.3, lambda a: try_ledger(rng, a, var)),
            Edge(Area("text for training"), 0.7, lambda a: try_text(rng, a, var)),
            Edge(
                Area("protobuf to the trainer"),
                0.7,
                lambda a: try_grpc(rng, a, trainer.channel, training_pb2),
                pid=trainer_pid,
            ),
            Edge(Area("file of Redis's password"), 0.4, lambda a: try_password(rng, a, trainer), pid=trainer_pid),
            Edge(
                Area("what Redis holds"),
                5.0,
                lambda a: try_redis(rng, a, trainer),
                lambda a: check_redis(a, trainer),
                trainer_pid,
            ),
        ]
        edges = [edge for edge in edges if only in edge.area.name]
        whole = sum(edge.share for edge in edges)
        for edge in edges:
            with GoodClients(secured, edge.area) if edge.area.name == "TLS ports" else contextlib.nullcontext():
                edge.run(minutes * 60 * edge.share / whole)
        read_lines(edges[-1].area, trainer.lines.copy())
        for each in kept:
            each.close()
        channel.close()
        target.http.close()
        for server in (target.server, secured.server):
            if code := server.end():
                edges[-1].area.fell(f"a server ended with {code}", server.lines[-20:])
    areas = [edge.area for edge in edges]
    rows = []
    for area in areas:
        rows.append((area.name, str(area.inputs), str(len(area.findings))))
        rows += [(f"  {kind}", str(count), "") for kind, count in sorted(area.counts.items()) if kind]
    print_rows(("edge", "inputs", "fell"), rows)
    print(f"{sum(area.inputs for area in areas)} inputs in {time.monotonic() - begin:.0f} s, with the seed {seed}")
    if any(area.findings for area in areas):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
