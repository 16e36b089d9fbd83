import errno
import os
import socket

import pytest

from shared.errors import AlreadyExists, InvalidArgument
from shared.service.listening import Address, ipv4_alone


def at(host: str, port: int = 0) -> Address:
    return Address(host, port, "THE_HOST", "THE_PORT")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_free_address_can_be_listened_on(host: str) -> None:
    with at(host).listener() as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize(
    "host", ["192.0.2.1", "no.such.host.invalid", "127.0.0.1:80", "[::1]", "a..b", "x" * 300, "\udcff", "line\nbreak"]
)
def test_an_error_of_the_host_names_its_variable(host: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^THE_HOST is .*not an address of this machine") as raised:
        at(host).listener()
    assert "THE_PORT" not in str(raised.value)
    assert len(str(raised.value)) <= 300
    assert str(raised.value).isprintable()


def test_an_error_of_a_port_in_use_names_its_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AlreadyExists, match=rf"Port {port} of 127\.0\.0\.1 is in use.*THE_PORT"):
            at("127.0.0.1", port).listener()


def test_a_port_must_be_free_on_every_address_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, port: int, type: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        places = [("192.0.2.1", port), ("127.0.0.2", port), ("127.0.0.1", port)]
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", place) for place in places]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AlreadyExists, match="in use"):
            at("both", port).listener()
    with at("both", port).listener() as listener:
        assert listener.getsockname() == ("127.0.0.2", port)


def test_an_error_of_a_privileged_port_names_its_variable() -> None:
    error = OSError(errno.EACCES, os.strerror(errno.EACCES))
    assert "THE_PORT is 80" in str(at("127.0.0.1", 80).refusal(error))


def test_the_port_of_ipv6_is_taken_while_grpc_binds_to_ipv4() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("Needs IPv6.")
    with (
        ipv4_alone(at("0.0.0.0")) as port,
        pytest.raises(OSError),
        socket.create_server(("::", port), family=socket.AF_INET6),
    ):
        pass
    with ipv4_alone(at("127.0.0.1", 0)) as port:
        assert port == 0
