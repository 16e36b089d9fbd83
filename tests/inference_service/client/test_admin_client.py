"""The client of operators, if a proxy is set, if no server answers, and with a token that cannot be sent."""

import socket
from collections.abc import Callable

import pytest

from inference_service.client import AdminClient, Credentials
from shared import errors
from tests.inference_service.operated import TOKEN, Operated


def test_a_token_that_metadata_cannot_carry_is_rejected() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"^The token contains a character") as rejected:
        AdminClient("127.0.0.1:1", Credentials(token="öffne dich"))
    assert "dich" not in str(rejected.value)


def test_an_http_proxy_is_ignored(operated: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with AdminClient(operated.server.address, Credentials(token=TOKEN)) as admin:
        assert admin.versions().versions


def test_a_silent_server_is_reported_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        calls: list[tuple[str, Callable[[AdminClient], object]]] = [
            ("0.1", lambda admin: admin.versions()),
            ("0.2", lambda admin: admin.load(1, timeout_s=0.2)),
        ]
        for limit, call in calls:
            sentence = f"The server at {address} did not answer within {limit} s"
            with AdminClient(address, timeout_s=0.1) as admin, pytest.raises(errors.DeadlineExceeded, match=sentence):
                call(admin)
