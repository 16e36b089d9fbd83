"""Which calls of either face need which token; the server is a process of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from inference_service.client import Credentials, InferenceClient
from shared.errors import Unauthenticated, shown
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.fakes import publish_tiny_version
from tests.inference_service.process import ROOT, SERVE, Server
from tests.token_files import ALICE, BOB, OPERATOR, write_tokens
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow

# What a client may do, and what an operator alone.
CALLS: dict[bool, list[tuple[str, Any]]] = {
    True: [
        ("Generate", pb.GenerateRequest(prompt="x", max_tokens=1)),
        ("Tokenize", pb.TokenizeRequest(text="x")),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[97])),
        ("GetModel", pb.GetModelRequest()),
    ],
    False: [
        ("ListVersions", pb.ListVersionsRequest()),
        ("LoadVersion", pb.LoadVersionRequest(version=1)),
        ("UnloadVersion", pb.UnloadVersionRequest(version=9)),
        ("PromoteVersion", pb.PromoteVersionRequest(version=1)),
        ("SetPolicy", pb.SetPolicyRequest(label="best")),
        ("RollBack", pb.RollBackRequest(version=9)),
    ],
}
PATHS: dict[bool, list[tuple[str, str, dict[str, Any]]]] = {
    True: [
        ("POST", "v1/completions", {"prompt": "x", "max_tokens": 1}),
        ("POST", "v1/completions", {"prompt": "x", "max_tokens": 1, "stream": True}),
        ("POST", "v1/chat/completions", {}),
        ("GET", "v1/models", {}),
        ("GET", "v1/models/best", {}),
        ("GET", "api/runs", {}),
        ("GET", "api/runs/a", {}),
        ("GET", "v1", {}),
        ("GET", "api", {}),
        ("GET", "missing", {}),
    ],
    False: [
        ("GET", "api/versions", {}),
        ("POST", "api/versions/1/load", {}),
        ("POST", "api/versions/9/unload", {}),
        ("POST", "api/versions/1/promote", {}),
        ("POST", "api/policy", {"label": "best"}),
        ("POST", "api/rollback", {"version": 9}),
        ("POST", "%61pi/rollback", {"version": 9}),
        ("POST", "api/missing", {}),
        ("PUT", "api/policy", {}),
    ],
}
CLIENTS = [pytest.param(True, id="clients"), pytest.param(False, id="operators")]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder / "clients", f"alice {ALICE}")
    write_tokens(folder / "operators", f"olga {OPERATOR}")
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Server]:
    settings = {
        "GPTLOOP_CLIENT_TOKENS": str(files / "clients"),
        "GPTLOOP_OPERATOR_TOKENS": str(files / "operators"),
    }
    server = Server(files / "var", **settings)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines
        log = "".join(server.lines)
        assert "Traceback" not in log, log
        assert not any(token in log for token in (ALICE, BOB, OPERATOR))


def code(channel: grpc.Channel, method: str, request: Any, token: str) -> str:
    """Returns the name of the status with which a call ends."""
    inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
    admin: Any = inference_pb2_grpc.ModelAdminServiceStub(channel)
    call = getattr(inference, method, None) or getattr(admin, method)
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        answer = call(request, timeout=HANG_S, metadata=metadata)
        if method == "Generate":
            list(answer)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def ask(server: Server, method: str, path: str, body: dict[str, Any], token: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.request(
        method, f"{server.page_url}{path}", json=body if method != "GET" else None, headers=headers, timeout=HANG_S
    )


@pytest.mark.parametrize("for_clients", CLIENTS)
def test_each_call_over_grpc_needs_its_token(server: Server, for_clients: bool) -> None:
    with grpc.insecure_channel(server.address) as channel:
        for method, request in CALLS[for_clients]:
            ends = [code(channel, method, request, token) for token in ("", BOB, ALICE, OPERATOR)]
            assert ends[:2] == ["UNAUTHENTICATED"] * 2, method
            # Two of the requests name a version that does not exist.
            allowed = "NOT_FOUND" if "version: 9" in str(request) else "OK"
            assert ends[2:] == ["OK" if for_clients else "PERMISSION_DENIED", allowed], method


@pytest.mark.parametrize("for_clients", CLIENTS)
def test_each_request_over_http_needs_its_token(server: Server, for_clients: bool) -> None:
    for method, path, body in PATHS[for_clients]:
        for token in ("", BOB):
            refused = ask(server, method, path, body, token)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer"), path
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
            assert "bearer token" in error["message"]
        refused = ask(server, method, path, body, ALICE)
        if not for_clients:
            assert refused.status_code == 403, path
            assert refused.json()["error"] == {
                "message": "This call needs the token of an operator, but has that of a client.",
                "type": "permission_error",
                "param": None,
                "code": None,
            }
        for answer in (ask(server, method, path, body, OPERATOR), *([refused] if for_clients else [])):
            assert answer.status_code not in (401, 403, 500), path
            assert "server_error" not in answer.text


def test_the_files_of_the_page_need_no_token_and_say_which_ones_the_rest_needs(server: Server) -> None:
    for path in ("", "web/app.js", "web/missing.js"):
        assert ask(server, "GET", path, {}, "").status_code in (200, 404)
    needed = ask(server, "GET", "api/server", {}, "").json()["needs_token"]
    assert needed == {"clients": True, "operators": True}


def test_one_request_over_http_has_one_token(server: Server) -> None:
    headers = [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {OPERATOR}")]
    assert httpx.get(f"{server.page_url}v1/models", headers=headers, timeout=HANG_S).status_code == 401
    assert httpx.get(f"{server.page_url}v1/models?token={ALICE}", timeout=HANG_S).status_code == 401


def test_the_log_says_who_calls(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        assert code(channel, "PromoteVersion", pb.PromoteVersionRequest(version=1), OPERATOR) == "OK"
        assert code(channel, "GetModel", pb.GetModelRequest(), ALICE) == "OK"
    ask(server, "POST", "api/policy", {"label": "best"}, OPERATOR)
    ask(server, "POST", "v1/completions", {"prompt": "x", "max_tokens": 1}, ALICE)
    for call, caller in (
        ("PromoteVersion: OK", "olga"),
        ("GetModel: OK", "alice"),
        ("POST /api/policy: 200", "olga"),
        ("POST /v1/completions: 200", "alice"),
    ):
        named = re.compile(f"{re.escape(call)}.*caller={caller}")
        wait_until(lambda named=named: any(named.search(line) for line in server.lines.copy()))  # type: ignore[misc]


def test_a_stream_goes_on_when_its_token_is_removed_and_the_next_call_is_refused(server: Server, files: Path) -> None:
    try:
        with (
            InferenceClient(server.address, credentials=Credentials(token=ALICE)) as client,
            client.generate("x", max_tokens=2000, ignore_eos=True) as stream,
        ):
            events = iter(stream)
            next(events)
            write_tokens(files / "clients", f"alice {BOB}")
            with pytest.raises(Unauthenticated, match="the wrong bearer token"):
                client.model()
            assert sum(len(event.token_ids) for event in events if isinstance(event, pb.Delta)) > 0
        with InferenceClient(server.address, credentials=Credentials(token=BOB)) as client:
            assert client.model().version == 1
    finally:
        write_tokens(files / "clients", f"alice {ALICE}")


@pytest.mark.parametrize("module", ["inference_service", "trainer_service"])
def test_a_service_does_not_start_with_a_wrong_file(tmp_path: Path, module: str) -> None:
    path = write_tokens(tmp_path / "operators", "olga too-short")
    done = subprocess.run(
        [sys.executable, "-m", module, *SERVE[2:]],
        cwd=ROOT,
        env={**os.environ, "GPTLOOP_VAR": str(tmp_path / "var"), "GPTLOOP_OPERATOR_TOKENS": str(path)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: GPTLOOP_OPERATOR_TOKENS: the file {shown(str(path), 150)} has a token of 9 characters"
    )
    assert "too-short" not in done.stderr
