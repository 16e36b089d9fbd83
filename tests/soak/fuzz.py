"""Feeds odd inputs to every edge: calls over gRPC and HTTP, connections, files of the registry, and what Redis holds.

`python -m tests.soak.fuzz --minutes 10`
"""

import contextlib
import logging
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import grpc
import httpx
import typer

from shared.errors import GptloopError
from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2
from shared.service.lists import print_rows
from tests.fakes import publish_tiny_version
from tests.fuzzers.area import CALL_S, Area, read_lines, resident_kib
from tests.fuzzers.calls import try_connection, try_grpc, try_http
from tests.fuzzers.files import files_of, registry_of, try_commands, try_ledger, try_text, try_tokens, try_version
from tests.fuzzers.redis import Trainer, try_redis
from tests.inference_service.process import Server
from tests.mutations import odd_file
from tests.records import write_record
from tests.waiting import wait_until


class Target:
    """A live inference server, and the checks that it still answers."""

    def __init__(self, folder: Path) -> None:
        self.server = Server(folder / "var", GPTLOOP_INFERENCE_SLOTS="4", GPTLOOP_INFERENCE_MAX_WAITING_REQUESTS="64")
        self.registry = self.server.registry
        for number in range(3):
            publish_tiny_version(self.registry, 1.0 / (number + 1))
            write_record(self.registry, self.registry.version(number + 1), 1.0)
        wait_until(self.server.serves)

    def answers(self) -> bool:
        """Whether a good request is answered over gRPC and HTTP."""
        try:
            with self.server.client() as client:
                client.complete("Once", max_tokens=3, timeout_s=CALL_S)
            return httpx.get(f"{self.server.page_url}v1/models", timeout=CALL_S).status_code == 200
        except (GptloopError, httpx.HTTPError):
            return False


def run_for(seconds: float, area: Area, step: Callable[[], object], target: Target | None = None) -> None:
    """Repeats a step for a time; then the server must answer, and its log have no traceback."""
    end = time.monotonic() + seconds
    memory = resident_kib(target.server.process.pid) if target else 0
    before = area.inputs
    while time.monotonic() < end:
        step()
    if target is None:
        return
    if target.server.process.poll() is not None:
        area.fell("the server ended", target.server.lines[-40:])
        return
    if not target.answers():
        area.fell("the server does not answer a good request")
    read_lines(area, target.server.lines.copy())
    grown = resident_kib(target.server.process.pid) - memory
    print(f"{area.name}: {area.inputs - before} inputs, memory grew by {grown} KiB", flush=True)


def main(
    minutes: Annotated[float, typer.Option(min=0.01)] = 10.0,
    seed: int = 0,
    only: str = "",
) -> None:
    """Feeds odd inputs to every edge; exits with 1 if something fell."""
    rng = random.Random(seed)
    logging.disable(logging.CRITICAL)
    areas: list[Area] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, contextlib.ExitStack() as ends:
        folder = Path(name)
        target = Target(folder)
        ends.callback(target.server.end)
        channel = grpc.insecure_channel(target.server.address, options=[("grpc.enable_http_proxy", 0)])
        client = httpx.Client()
        kept: list[socket.socket] = []
        grpc_port = int(target.server.address.rpartition(":")[2])
        http_port = httpx.URL(target.server.page_url).port or 80
        var = folder / "disk"
        registry_of(var)
        os.environ["GPTLOOP_VAR"] = str(var)

        def mutate_live() -> None:
            path = rng.choice(files_of(target.registry.root))
            before = path.read_bytes()
            path.write_bytes(odd_file(rng, before))
            live.inputs += 1
            with contextlib.suppress(httpx.HTTPError, GptloopError):
                for each in ("api/runs", "api/versions", "v1/models", "api/runs/tiny"):
                    answer = client.get(f"{target.server.page_url}{each}", timeout=CALL_S)
                    if answer.status_code >= 500 and answer.status_code != 503:
                        live.fell(f"GET {each} {answer.status_code}", (path.name, path.read_bytes()))
            time.sleep(0.06)
            path.write_bytes(before)

        live = Area("files under a live server")
        plan: list[tuple[Area, Callable[[Area], object], bool]] = [
            (Area("protobuf to the inference server"), lambda a: try_grpc(rng, a, channel, inference_pb2), True),
            (Area("JSON over HTTP"), lambda a: try_http(rng, a, client, target.server.page_url), True),
            (Area("bytes to the gRPC port"), lambda a: try_connection(rng, a, grpc_port, kept), True),
            (Area("bytes to the HTTP port"), lambda a: try_connection(rng, a, http_port, kept), True),
            (live, lambda a: mutate_live(), True),
            (Area("files read by commands"), lambda a: try_commands(rng, a, var), False),
            (Area("files of a version"), lambda a: try_version(rng, a, var), False),
            (Area("files of tokens"), lambda a: try_tokens(rng, a, var), False),
            (Area("ledgers of teachers"), lambda a: try_ledger(rng, a, var), False),
            (Area("text for training"), lambda a: try_text(rng, a, var), False),
        ]
        trainer = Trainer(folder / "trainer")
        ends.callback(trainer.end)
        plan += [
            (Area("what Redis holds"), lambda a: try_redis(rng, a, trainer), False),
            (Area("protobuf to the trainer"), lambda a: try_grpc(rng, a, trainer.channel, training_pb2), False),
        ]
        plan = [each for each in plan if only in each[0].name]
        for area, step, is_live in plan:
            run_for(minutes * 60 / len(plan), area, partial(step, area), target if is_live else None)
            areas.append(area)
        if not trainer.works():
            areas[-1].fell("the trainer or its worker does not do a good job", trainer.lines[-40:])
        read_lines(areas[-1], trainer.lines.copy())
        for each in kept:
            each.close()
        channel.close()
        client.close()
        code = target.server.end()
        if code:
            areas[-1].fell(f"the server ended with {code}")
    rows = [(area.name, str(area.inputs), str(len(area.findings))) for area in areas]
    print_rows(("edge", "inputs", "fell"), rows)
    if any(area.findings for area in areas):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
