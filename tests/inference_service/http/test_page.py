"""The JSON that the page reads and sends, and its files."""

import hashlib
import json
import re
import socket
from dataclasses import replace
from typing import Any

import httpx
import pytest

from shared.registry.history import EvaluationLine, ReportLine
from tests.fakes import TINY
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import ROOT
from tests.waiting import HANG_S

pytestmark = pytest.mark.slow

WEB = ROOT / "inference_service" / "web"
# The files of uPlot 1.6.32 as npm has them.
VENDORED = {
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
    "uPlot.esm.js": "5dd9b3281aa64b461b42d9945f6adb2649d346502b12281a9ae0d46599a80eba",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
}


def get(operated: Operated, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{operated.server.page_url}{path}", headers=headers, timeout=HANG_S)


def post(operated: Operated, path: str, body: object = None, token: str = TOKEN) -> httpx.Response:
    headers = {"content-type": "application/json", "authorization": f"Bearer {token}"}
    content = "" if body is None else json.dumps(body)
    return httpx.post(f"{operated.server.page_url}{path}", content=content, headers=headers, timeout=HANG_S)


def listed(operated: Operated) -> dict[str, Any]:
    answer = get(operated, "api/versions", authorization=f"Bearer {TOKEN}").json()
    assert isinstance(answer, dict)
    return answer


def state(operated: Operated, number: int) -> dict[str, Any]:
    (found,) = (each for each in listed(operated)["versions"] if each["version"] == str(number))
    assert isinstance(found, dict)
    return found


def message(response: httpx.Response) -> str:
    return str(response.json()["error"]["message"])


def report(run: str, operated: Operated, *steps: int) -> None:
    registry = operated.server.registry
    lines = [ReportLine(step, 100 * step, 1 / step, 1e-3, 0.1, 5.0, 1, 2, 3, 1.7e9, 1) for step in steps]
    last = EvaluationLine(steps[-1], 100, 2.5, 1.5, None, 1.7e9, 1)
    registry.histories.writer(registry.take_over(run), 0).append(*lines, last)


def test_the_runs_come_with_what_the_page_shows_of_them(operated: Operated) -> None:
    report("calm", operated, 1, 2)
    run = {each["run"]: each for each in get(operated, "api/runs").json()["runs"]}["calm"]
    assert (run["step"], run["loss"], run["validation_loss"], run["bits_per_byte"]) == (2, 0.5, 2.5, 1.5)
    assert (run["ended"], run["max_steps"], run["versions"]) == (False, None, [])
    assert 0 <= run["age_s"] < HANG_S
    whole = get(operated, "api/runs/calm").json()
    assert whole["reports"]["step"] == [1, 2]
    assert whole["cursor"] == run["cursor"]
    more = get(operated, f"api/runs/calm?after={run['cursor']}").json()
    assert (more["continues"], more["reports"]["step"]) == (True, [])
    operated.server.registry.end_run("calm")
    assert {each["run"]: each["ended"] for each in get(operated, "api/runs").json()["runs"]}["calm"]


def test_an_unknown_run_is_named(operated: Operated) -> None:
    refused = get(operated, "api/runs/loud")
    assert (refused.status_code, message(refused)) == (404, "There is no history of a run named 'loud'.")


def test_the_versions_are_those_that_operators_see(operated: Operated) -> None:
    serving = operated.publish_serving(config=replace(TINY, context_length=16384))
    answer = listed(operated)
    expected = operated.admin.versions()
    assert [int(each["version"]) for each in answer["versions"]] == [each.version for each in expected.versions]
    assert answer["policy"] == "best"
    assert answer["runs"][str(serving)] == operated.server.registry.version(serving).run
    status = state(operated, serving)
    assert status["state"] == "VERSION_STATE_SERVING"
    assert status["digest"] == operated.server.registry.version(serving).digest
    with operated.stream(serving):
        assert state(operated, serving)["streams"] == 1


def test_an_operator_does_everything_over_http(operated: Operated) -> None:
    first, second = operated.publish_serving(), operated.publish_serving()
    assert post(operated, f"api/versions/{first}/load").json()["version"]["held"]
    assert post(operated, f"api/versions/{first}/unload", {}).status_code == 200
    assert "held" not in state(operated, first)
    assert "stable" in post(operated, f"api/versions/{first}/promote").json()["version"]["labels"]
    assert post(operated, "api/policy", {"label": f"pinned:{first}"}).status_code == 200
    operated.await_serving(first)
    assert post(operated, "api/policy", {"label": "best"}).status_code == 200
    operated.await_serving(second)
    rolled = post(operated, "api/rollback", {"version": first}).json()
    assert rolled["version"]["version"] == str(first)
    operated.await_serving(first)
    assert state(operated, second)["reason"] == "rolled_back: an operator rolled it back"
    assert listed(operated)["policy"] == f"pinned:{first}"


@pytest.mark.parametrize("path", ["api/rollback", "v1/completions"])
def test_a_client_that_leaves_inside_its_body_is_no_error(operated: Operated, path: str) -> None:
    url = httpx.URL(operated.server.page_url)
    with socket.create_connection((url.host, url.port or 0), HANG_S) as connection:
        connection.sendall(
            f"POST /{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {TOKEN}\r\nexpect: 100-continue\r\ncontent-length: 9\r\n\r\n".encode()
        )
        # The server reads the body.
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
    # The end of the server checks that its log has no traceback.
    assert get(operated, "api/server").status_code == 200


def test_a_mistake_gets_a_sentence(operated: Operated) -> None:
    serving = operated.publish_serving()
    for path, body, status, sentence in (
        ("api/versions/999/load", None, 404, "There is no version 999"),
        ("api/versions/0/load", None, 400, "version is 0, but versions are numbered from 1."),
        (f"api/versions/{10**30}/load", None, 404, "There is no version 1000000"),
        (f"api/versions/{'9' * 5000}/load", None, 404, "There is no version 99999"),
        ("api/versions/x/load", None, 404, "There is no page /api/versions/x/load."),
        (f"api/versions/{serving}/unload", None, 400, f"Version {serving} serves: pin another one, or roll back."),
        (f"api/versions/{serving}/load", {"now": True}, 400, "now is not supported; this call has no fields."),
        ("api/policy", None, 400, "label: Field required"),
        ("api/policy", {"label": 3}, 400, "label: Input should be a valid string, but there is 3."),
        ("api/policy", {"label": "finest"}, 400, "finest"),
        ("api/rollback", {"version": serving}, 400, f"Version {serving} serves already."),
        ("api/rollback", {"version": 10**30}, 400, "version"),
        ("api/rollback", {"version": -1}, 400, "version is -1, but versions are numbered from 1."),
    ):
        refused = post(operated, path, body)
        assert refused.status_code == status, path
        assert sentence in message(refused)
    assert operated.state(serving) == "SERVING"


def test_the_page_says_whether_it_needs_a_token(operated: Operated) -> None:
    answer = get(operated, "api/server").json()
    assert answer["needs_token"] == {"clients": False, "operators": True}
    assert re.fullmatch(r"\d+\.\d+\.\d+", answer["version"])


def test_files_have_their_type_and_are_checked_each_time(operated: Operated) -> None:
    for path, kind in (
        ("", "text/html; charset=utf-8"),
        ("web/style.css", "text/css; charset=utf-8"),
        ("web/app.js", "text/javascript"),
        ("web/vendor/uplot/uPlot.esm.js", "text/javascript"),
        ("web/icon.svg", "image/svg+xml"),
    ):
        answer = get(operated, path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.content == (WEB / (path.removeprefix("web/") or "index.html")).read_bytes()
        again = get(operated, path, **{"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_only_the_files_of_the_page_are_served(operated: Operated) -> None:
    for path in (
        "web/",
        "web/vendor",
        "web/missing.js",
        "web/%2e%2e/server.py",
        "web/..%2fserver.py",
        "web/%2fetc/passwd",
        "web//etc/passwd",
        "web/%00",
        "server.py",
        "favicon.ico",
    ):
        refused = get(operated, path)
        assert refused.status_code == 404, path
        assert message(refused).startswith("There is no page /"), path


def test_the_vendored_files_are_those_of_the_release() -> None:
    folder = WEB / "vendor" / "uplot"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == VENDORED


def test_the_page_needs_nothing_from_elsewhere_and_makes_no_markup_of_text() -> None:
    for path in (*WEB.glob("*.js"), WEB / "index.html", WEB / "style.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text), path
        assert len(text.splitlines()) <= 300, path
