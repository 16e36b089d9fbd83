"""What keeps other sites and other people away from a server on this machine."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.fakes import publish_tiny_version
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import Server
from tests.waiting import HANG_S

pytestmark = pytest.mark.slow

EVIL = "https://evil.example"
ALLOWED = "https://editor.example"
JSON = {"content-type": "application/json"}
TOKEN_HEADER = {"authorization": f"Bearer {TOKEN}"}
PAGES = ("", "web/app.js", "api/runs", "api/versions", "api/server", "v1/models", "missing")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has another name, and lets the pages of another site call it."""
    settings = {"GPTLOOP_INFERENCE_HTTP_HOSTS": "models.example", "GPTLOOP_INFERENCE_HTTP_ORIGINS": ALLOWED}
    server = Server(tmp_path_factory.mktemp("server") / "var", **settings)
    try:
        yield server
    finally:
        assert server.end() == 0, server.lines


def call(server: Server, method: str, path: str, content: str = "", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.request(method, f"{server.page_url}{path}", content=content, headers=named, timeout=HANG_S)


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize("path", PAGES)
def test_a_site_whose_name_was_made_to_point_here_reads_nothing(operated: Operated, path: str) -> None:
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        refused = call(operated.server, "GET", path, host=host)
        assert refused.status_code == 421
        assert "GPTLOOP_INFERENCE_HTTP_HOSTS" in message(refused)


def test_the_server_answers_to_addresses_to_localhost_and_to_its_names(server: Server) -> None:
    for host in (
        "127.0.0.1",
        "localhost:80",
        "LOCALHOST",
        "[::1]:8080",
        "192.0.2.7:1",
        "models.example",
        "Models.example:9",
    ):
        assert call(server, "GET", "api/server", host=host).status_code == 200, host


def test_a_request_without_a_host_is_refused(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(server.page_url).port, timeout=HANG_S)
    connection.putrequest("GET", "/api/server", skip_host=True)
    connection.endheaders()
    assert connection.getresponse().status in (400, 421)
    connection.close()


@pytest.mark.parametrize("path", PAGES)
def test_the_pages_of_another_site_may_not_call(operated: Operated, path: str) -> None:
    for origin in (EVIL, "null", "http://localhost.evil.example", f"{operated.server.page_url}".rstrip("/") + "0"):
        refused = call(operated.server, "GET", path, origin=origin)
        assert refused.status_code == 403
        assert "GPTLOOP_INFERENCE_HTTP_ORIGINS" in message(refused)


def test_another_site_may_neither_generate_nor_change_anything(operated: Operated) -> None:
    serving = operated.publish_serving()
    operated.publish()
    for path, body in (
        ("v1/completions", '{"prompt": "x"}'),
        ("api/rollback", "{}"),
        ("api/policy", '{"label": "latest"}'),
        (f"api/versions/{serving}/promote", ""),
    ):
        assert call(operated.server, "POST", path, body, **JSON, **TOKEN_HEADER, origin=EVIL).status_code == 403
        preflight = call(operated.server, "OPTIONS", path, origin=EVIL, access_control_request_method="POST")
        assert preflight.status_code == 403
        assert "access-control-allow-origin" not in preflight.headers
    assert operated.admin.versions().policy == "best"
    assert "stable" not in operated.status(serving).labels


def test_no_answer_may_be_read_by_other_sites_unless_they_are_named(operated: Operated, server: Server) -> None:
    same = operated.server.page_url.rstrip("/")
    assert "access-control-allow-origin" not in call(operated.server, "GET", "api/server", origin=same).headers
    answer = call(server, "GET", "api/server", origin=ALLOWED)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ALLOWED)
    assert "origin" in answer.headers["vary"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    assert call(server, "GET", "api/server", origin=EVIL).status_code == 403
    preflight = call(server, "OPTIONS", "v1/completions", origin=ALLOWED, access_control_request_method="POST")
    assert preflight.status_code == 204
    # The star, which the openai package in a browser needs for its own headers, leaves authorization out.
    assert preflight.headers["access-control-allow-headers"] == "*, authorization, content-type"


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_what_a_form_of_another_site_can_send_is_refused(operated: Operated, kind: str) -> None:
    serving = operated.publish_serving()
    headers = {**TOKEN_HEADER, **({"content-type": kind} if kind else {})}
    for path, body in (
        ("api/rollback", "{}"),
        ("api/rollback", ""),
        ("api/policy", '{"label": "latest"}'),
        (f"api/versions/{serving}/load", ""),
        (f"api/versions/{serving}/unload", ""),
        (f"api/versions/{serving}/promote", ""),
        ("v1/completions", '{"prompt": "x"}'),
    ):
        refused = call(operated.server, "POST", path, body, **headers)
        assert refused.status_code == 415, path
        assert message(refused) == f"The content type is {kind or 'missing'}, but must be application/json."
    assert (operated.state(serving), operated.status(serving).held) == ("SERVING", False)


@pytest.mark.parametrize(
    "given", [None, "", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}!", f"Bearer {TOKEN[:-1]}", "Bearer ", "bearer é"]
)
def test_nobody_changes_anything_without_the_token(operated: Operated, given: str | None) -> None:
    serving = operated.publish_serving()
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(operated.server.page_url).port, timeout=HANG_S)
    for path, body in (
        ("/api/rollback", {}),
        ("/api/policy", {"label": "latest"}),
        (f"/api/versions/{serving}/load", {}),
        (f"/api/versions/{serving}/unload", {}),
        (f"/api/versions/{serving}/promote", {}),
    ):
        headers = JSON if given is None else {**JSON, "authorization": given.encode("latin-1").decode("latin-1")}
        # Neither the address nor a cookie stands for the header.
        connection.request(
            "POST", f"{path}?token=open+sesame", json.dumps(body), {**headers, "cookie": f"token={TOKEN}"}
        )
        refused = connection.getresponse()
        sentence = json.loads(refused.read())["error"]["message"]
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert "put a valid one into the file that GPTLOOP_TOKEN_FILE names" in sentence
        assert refused.headers["set-cookie"] is None
    connection.close()
    assert (operated.state(serving), operated.admin.versions().policy) == ("SERVING", "best")
    assert (operated.status(serving).held, "stable" in operated.status(serving).labels) == (False, False)


def test_nobody_lists_versions_without_the_token(operated: Operated) -> None:
    for given in ({}, {"authorization": f"Bearer {TOKEN}!"}):
        refused = call(operated.server, "GET", "api/versions", **given)
        assert (refused.status_code, "versions" in refused.json()) == (401, False)
    assert call(operated.server, "GET", "api/versions", **TOKEN_HEADER).status_code == 200
    for path in ("api/runs", "v1/models"):
        assert call(operated.server, "GET", path).status_code == 200


def test_only_post_changes_anything(operated: Operated) -> None:
    serving = operated.publish_serving()
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
        for path in ("api/rollback", "api/policy", f"api/versions/{serving}/load"):
            refused = call(operated.server, method, path, **JSON, **TOKEN_HEADER)
            assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert operated.state(serving) == "SERVING"


@pytest.mark.parametrize("path", PAGES)
def test_every_answer_tells_the_browser_to_trust_nothing_from_elsewhere(operated: Operated, path: str) -> None:
    headers = call(operated.server, "GET", path).headers
    policy = headers["content-security-policy"].split("; ")
    assert policy[:2] == ["default-src 'self'", "frame-ancestors 'none'"]
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in headers
    refused = call(operated.server, "GET", path, host="evil.example").headers
    assert refused["content-security-policy"] == headers["content-security-policy"]


def test_a_server_without_a_token_needs_none(tmp_path: Path) -> None:
    server = Server(tmp_path / "var")
    try:
        publish_tiny_version(server.registry, 1.0)
        assert call(server, "POST", "api/versions/1/promote", **JSON).status_code == 200
        assert call(server, "GET", "api/server").json()["needs_token"] == {"clients": False, "operators": False}
    finally:
        assert server.end() == 0
