import socket
import threading
import urllib.request
from contextlib import ExitStack, suppress
from socketserver import ThreadingMixIn

import pytest
from prometheus_client import CollectorRegistry, Counter

from shared.errors import AlreadyExists, InvalidArgument
from shared.service import metrics_page as metrics_page_module
from shared.service.listening import Address
from shared.service.metrics_page import metrics_page
from tests.waiting import HANG_S, wait_until


def test_the_page_shows_the_registry() -> None:
    registry = CollectorRegistry()
    Counter("eggs_total", "Eggs.", registry=registry).inc(3)
    with (
        metrics_page(registry, Address("127.0.0.1", 0, "THE_HOST", "THE_PORT")) as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page,
    ):
        assert "eggs_total 3.0" in page.read().decode()


def test_a_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(AlreadyExists, match=rf"Port {port} .*THE_PORT"),
            metrics_page(CollectorRegistry(), Address("127.0.0.1", port, "THE_HOST", "THE_PORT")),
        ):
            pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "x" * 300])
def test_an_address_of_another_machine_is_an_error(host: str) -> None:
    with (
        pytest.raises(InvalidArgument, match="THE_HOST"),
        metrics_page(CollectorRegistry(), Address(host, 0, "THE_HOST", "THE_PORT")),
    ):
        pass


def test_a_scraper_that_hangs_delays_no_other() -> None:
    with (
        metrics_page(CollectorRegistry(), Address("127.0.0.1", 0, "THE_HOST", "THE_PORT")) as port,
        socket.create_connection(("127.0.0.1", port)) as hanging,
    ):
        hanging.sendall(b"GET /metrics HTTP/1.1\r\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as page:
            assert page.status == 200


def test_silent_scrapers_leave_room_for_others_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page_module._Handler, "timeout", 0.2)
    with (
        metrics_page(CollectorRegistry(), Address("127.0.0.1", 0, "THE_HOST", "THE_PORT")) as port,
        ExitStack() as kept,
    ):
        silent = [
            kept.enter_context(socket.create_connection(("127.0.0.1", port), HANG_S))
            for _ in range(2 * metrics_page_module.MAX_CONNECTIONS)
        ]
        # Those beyond the limit at once, the others once they have been silent for long.
        assert [each.recv(1) for each in silent] == [b""] * len(silent)
        # A connection is closed before it leaves its room.
        wait_until(lambda: _answers(port))


def test_a_connection_for_which_no_thread_can_start_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*given: object) -> None:
        raise RuntimeError("can't start new thread")

    with metrics_page(CollectorRegistry(), Address("127.0.0.1", 0, "THE_HOST", "THE_PORT")) as port:
        with monkeypatch.context() as full:
            full.setattr(ThreadingMixIn, "process_request", failing)
            assert not any(_answers(port) for _ in range(metrics_page_module.MAX_CONNECTIONS + 1))
        assert _answers(port)


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as page:
        return bool(page.status == 200)
    return False


def test_connections_beyond_the_limit_take_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_page_module._Handler, "timeout", HANG_S)
    with (
        metrics_page(CollectorRegistry(), Address("127.0.0.1", 0, "THE_HOST", "THE_PORT")) as port,
        ExitStack() as kept,
    ):
        before = set(threading.enumerate())
        limit = metrics_page_module.MAX_CONNECTIONS
        silent = [kept.enter_context(socket.create_connection(("127.0.0.1", port), HANG_S)) for _ in range(limit + 1)]
        assert silent[-1].recv(1) == b""
        # Threads of earlier tests may end meanwhile.
        assert len(set(threading.enumerate()) - before) == limit
