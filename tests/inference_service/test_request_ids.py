"""The ids of calls in the log of a server that writes JSON."""

import json
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.fakes import publish_tiny_version
from tests.inference_service.process import BREAKABLE, Server
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"GPTLOOP_LOG_FORMAT": "json", "GPTLOOP_LOG_LEVEL": "debug"}
    server = Server(tmp_path_factory.mktemp("server") / "var", BREAKABLE, **settings)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines
        assert all(isinstance(json.loads(line), dict) for line in server.lines)


def lines_of(server: Server, request_id: str, count: int) -> list[dict[str, Any]]:
    """Returns the log lines of a call once there are `count` of them."""

    def found() -> list[dict[str, Any]]:
        return [each for line in server.lines.copy() if (each := json.loads(line)).get("request_id") == request_id]

    wait_until(lambda: len(found()) >= count)
    return found()


def with_message(server: Server, part: str) -> list[dict[str, Any]]:
    """Returns the lines whose message has a part, once there is one."""

    def found() -> list[dict[str, Any]]:
        return [line for line in map(json.loads, server.lines.copy()) if part in line["message"]]

    wait_until(lambda: bool(found()))
    return found()


def generate(server: Server, request_id: str) -> list[pb.GenerateResponse]:
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(prompt="a", max_tokens=5, ignore_eos=True)
        return list(stub.Generate(request, metadata=(("x-request-id", request_id),)))


def test_a_stream_has_the_request_id_of_its_call_and_a_line_at_its_end(server: Server) -> None:
    answers = generate(server, "call-1")
    assert answers[0].started.request_id == "call-1"
    (line,) = lines_of(server, "call-1", 1)
    expected = {"level": "info", "method": "Generate", "status": "OK", "generated_tokens": 5, "version": 1}
    assert line.items() >= expected.items()
    assert 0 < line["duration_s"] < HANG_S
    assert line["run"] == server.registry.version(1).run


def test_a_completion_over_http_counts_the_tokens_of_all_its_prompts(server: Server) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 4, "ignore_eos": True}
    answer = httpx.post(
        f"{server.page_url}v1/completions", json=body, headers={"x-request-id": "call-2"}, timeout=HANG_S
    )
    assert answer.headers["x-request-id"] == "call-2"
    (line,) = lines_of(server, "call-2", 1)
    expected = {"method": "POST /v1/completions", "status": "200", "generated_tokens": 8, "version": 1}
    assert line.items() >= expected.items()


def test_every_answer_over_http_has_an_id_and_reading_is_logged_as_debug(server: Server) -> None:
    for method, path, status in (("GET", "api/runs", 200), ("GET", "missing%0Apath", 404), ("HEAD", "api/runs", 200)):
        headers = {b"x-request-id": "ü".encode()}
        answer = httpx.request(method, f"{server.page_url}{path}", headers=headers, timeout=HANG_S)
        (line,) = lines_of(server, answer.headers["x-request-id"], 1)
        assert (answer.status_code, line["status"], line["level"]) == (status, str(status), "debug")
        assert "\n" not in str(line["message"])


def test_the_line_of_a_cancelled_stream_counts_the_tokens_that_it_was_sent(server: Server) -> None:
    server.order("hold after one")
    with grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(prompt="a", max_tokens=20, ignore_eos=True)
        call = stub.Generate(request, metadata=(("x-request-id", "cancelled"),))
        received = next(len(answer.delta.token_ids) for answer in call if answer.delta.token_ids)
        call.cancel()
        try:
            (line,) = lines_of(server, "cancelled", 1)
        finally:
            server.order("go on")
    assert line["status"] == "CANCELLED" and line["generated_tokens"] >= received


def test_the_lines_of_the_engine_name_the_call_whose_step_failed(server: Server) -> None:
    server.order("fail once")
    with pytest.raises(grpc.RpcError):
        generate(server, "call-3")
    (line,) = with_message(server, "streams failed")
    assert line["message"] == "a step of 1 streams failed, of the requests call-3"
    assert (line["version"], line["level"], line["logger"]) == (1, "error", "inference_service.engine.engine")
    assert "RuntimeError: the device is gone" in line["exception"]


def test_the_lines_of_a_version_name_it_and_its_run(server: Server) -> None:
    ready, serves = with_message(server, "is ready"), with_message(server, "serves: step")
    run = server.registry.version(1).run
    assert [(line["version"], line["run"]) for line in (*ready, *serves)] == [(1, run)] * 2
