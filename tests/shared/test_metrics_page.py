import socket
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from shared.errors import AlreadyExists, InvalidArgument
from shared.metrics_page import metrics_page


def test_the_page_shows_the_registry() -> None:
    registry = CollectorRegistry()
    Counter("eggs_total", "Eggs.", registry=registry).inc(3)
    with (
        metrics_page(registry, "127.0.0.1", 0, "GPTLOOP_X") as port,
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page,
    ):
        assert "eggs_total 3.0" in page.read().decode()


def test_a_port_in_use_is_named_with_its_variable() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(AlreadyExists, match=rf"Port {port} .*GPTLOOP_X"),
            metrics_page(CollectorRegistry(), "127.0.0.1", port, "GPTLOOP_X"),
        ):
            pass


def test_an_address_of_another_machine_is_refused() -> None:
    with (
        pytest.raises(InvalidArgument, match=r"192\.0\.2\.1:0 cannot be listened on"),
        metrics_page(CollectorRegistry(), "192.0.2.1", 0, "GPTLOOP_X"),
    ):
        pass
