"""The traces of a server, received by a collector."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.collector import Collector, collecting
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.waiting import HANG_S, wait_until

pytest.importorskip("opentelemetry.sdk", reason="`make .venv/traces` installs OpenTelemetry")

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{CLIENT}-01"
GENERATION: dict[str, dict[str, object]] = {"queue": {}, "prompt": {}, "decode": {}}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder / "var", GPTLOOP_LOG_FORMAT="json", **collector.settings)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines


def test_a_call_over_grpc_is_in_the_trace_of_its_client_with_its_parts(server: Server, collector: Collector) -> None:
    request = pb.GenerateRequest(prompt="Once", max_tokens=7, ignore_eos=True)
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        list(stub.Generate(request, metadata=(("traceparent", PARENT), ("x-request-id", "traced"))))
    call = collector.named("inference.v1.InferenceService/Generate")
    assert (call.trace, call.parent, call.service) == (TRACE, CLIENT, "gptloop-inference")
    expected = {"rpc.system": "grpc", "rpc.grpc.status_code": 0, "gptloop.request_id": "traced"}
    assert call.attributes.items() >= expected.items()
    assert collector.tree(call) == {"text_completion 1": GENERATION}
    generation = collector.named("text_completion 1", gen_ai__response__id="traced")
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.response.model": "1",
        "gen_ai.request.max_tokens": 7,
        "gen_ai.usage.input_tokens": 4,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.finish_reasons": ["length"],
    }
    assert generation.attributes.items() >= expected.items()
    queue, prompt, decode = sorted(
        (span for span in collector.spans if span.parent == generation.id), key=lambda span: span.begin_ns
    )
    # The engine measures seconds as floating-point numbers.
    near = 1_000_000
    assert abs(queue.end_ns - prompt.begin_ns) < near and abs(prompt.end_ns - decode.begin_ns) < near
    assert queue.begin_ns < decode.end_ns

    def lines() -> list[dict[str, Any]]:
        read = (json.loads(line) for line in server.lines.copy())
        return [line for line in read if line.get("request_id") == "traced"]

    wait_until(lambda: bool(lines()))
    (line,) = lines()
    assert (line["trace_id"], line["span_id"]) == (TRACE, call.id)


def test_a_request_over_http_is_a_trace_with_its_parts(server: Server, collector: Collector) -> None:
    answer = httpx.post(
        f"{server.page_url}v1/completions",
        json={"prompt": ["a", "b"], "max_tokens": 3, "ignore_eos": True},
        headers={"traceparent": PARENT.replace(TRACE, TRACE[::-1]), "x-request-id": "over-http"},
        timeout=HANG_S,
    )
    assert answer.status_code == 200
    call = collector.named("POST /v1/completions", gptloop__request_id="over-http")
    assert (call.trace, call.parent) == (TRACE[::-1], CLIENT)
    below = [span for span in collector.spans if span.parent == call.id]
    assert [span.name for span in below] == ["text_completion 1"] * 2
    assert [collector.tree(span) for span in below] == [GENERATION] * 2


def test_an_error_is_the_status_of_its_span(server: Server, collector: Collector) -> None:
    with server.client() as client, pytest.raises(errors.NotFound) as raised:
        client.model(version=99)
    call = collector.named("inference.v1.InferenceService/GetModel")
    assert call.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    assert call.attributes["gptloop.request_id"] == raised.value.request_id
    assert not call.fails


def test_the_load_of_a_version_is_a_trace(server: Server, collector: Collector) -> None:
    load = collector.named("load version", gptloop__version=1)
    assert collector.tree(load) == {"read": {}, "examine": {}}
    assert load.parent == ""


def test_the_kept_instrumentation_of_clients_continues_their_trace(server: Server, collector: Collector) -> None:
    from opentelemetry import trace
    from opentelemetry.instrumentation.grpc import aio_client_interceptors
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(shutdown_on_exit=False)

    async def tokenize() -> None:
        interceptors = aio_client_interceptors(tracer_provider=provider)
        async with grpc.aio.insecure_channel(server.address, interceptors=interceptors) as channel:
            stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            await stub.Tokenize(pb.TokenizeRequest(text="a"))

    with provider.get_tracer("test").start_as_current_span("mine") as mine:
        asyncio.run(tokenize())
    call = collector.named("inference.v1.InferenceService/Tokenize")
    assert call.trace == trace.format_trace_id(mine.get_span_context().trace_id)


def test_a_server_without_its_collector_serves_and_stops(tmp_path: Path) -> None:
    with collecting() as gone:
        settings = gone.settings
    server = Server(tmp_path / "var", **settings)
    publish_tiny_version(server.registry, 1.0)
    wait_until(server.serves)
    with server.client() as client:
        assert client.complete("a", max_tokens=3).text is not None
    assert server.end() == 0
    assert not [line for line in server.lines if "Traceback" in line]
