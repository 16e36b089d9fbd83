import pytest

from deploy.ports import Ports, free_ports, page_url, read_ports
from shared.errors import InvalidArgument


def test_ports_come_from_the_environment() -> None:
    assert read_ports({}) == Ports(50051, 8080, 9101, 50052, 9102)
    chosen = free_ports()
    assert read_ports(chosen.to_environment()) == chosen


@pytest.mark.parametrize("text", ["0", "70000", "x"])
def test_a_bad_port_is_named(text: str) -> None:
    with pytest.raises(InvalidArgument, match="GPTLOOP_TRAINER_PORT"):
        read_ports({"GPTLOOP_TRAINER_PORT": text})


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("192.0.2.1", "192.0.2.1")],
)
def test_the_page_is_where_a_browser_on_this_machine_finds_it(host: str, shown: str) -> None:
    ports = Ports(1, 8090, 2, 3, 4)
    assert page_url({"GPTLOOP_INFERENCE_HOST": host}, ports) == f"http://{shown}:8090/"


def test_two_services_on_one_port_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="GPTLOOP_INFERENCE_PORT and GPTLOOP_TRAINER_PORT"):
        read_ports({"GPTLOOP_TRAINER_PORT": "50051"})


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"GPTLOOP_INFERENCE_HOST is '192\.0\.2\.1'"):
        free_ports().check_free({"GPTLOOP_INFERENCE_HOST": "192.0.2.1"})


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports()
    assert len(set(ports.to_environment().values())) == len(vars(ports))
    ports.check_free({})
