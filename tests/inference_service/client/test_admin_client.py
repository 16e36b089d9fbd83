"""The client of operators where something stands between it and the server, or no server is there."""

import socket
from collections.abc import Callable

import pytest

from inference_service.client.admin_client import AdminClient
from shared import errors
from tests.inference_service.operated import TOKEN, Operated


def test_a_client_refuses_a_credential_that_no_call_can_carry() -> None:
    with pytest.raises(errors.InvalidArgument, match=r"^The credential holds a character") as refused:
        AdminClient("127.0.0.1:1", "öffne dich")
    assert "dich" not in str(refused.value)


def test_a_proxy_for_the_web_stands_not_in_the_way(operated: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with AdminClient(operated.server.address, TOKEN) as admin:
        assert admin.versions().versions


def test_no_server_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with (
            AdminClient(address) as admin,
            pytest.raises(errors.Unavailable, match=f"No server answers at {address}"),
        ):
            admin.roll_back()


def test_a_server_that_does_not_answer_is_one_sentence() -> None:
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
