"""The four TCP ports of the services."""

import socket
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from shared.errors import InvalidArgument
from shared.service.listening import Address
from shared.service.settings import Environment, read_int, read_str


@dataclass(frozen=True)
class Ports:
    """Where the services listen: gRPC and `/metrics` of each."""

    inference: int = 50051
    inference_metrics: int = 9101
    trainer: int = 50052
    trainer_metrics: int = 9102

    def to_environment(self) -> dict[str, str]:
        """The variables from which the services read these ports."""
        return {
            "GPTLOOP_INFERENCE_PORT": str(self.inference),
            "GPTLOOP_INFERENCE_METRICS_PORT": str(self.inference_metrics),
            "GPTLOOP_TRAINER_PORT": str(self.trainer),
            "GPTLOOP_TRAINER_METRICS_PORT": str(self.trainer_metrics),
        }

    def check_free(self, environment: Environment) -> None:
        """Raises `AlreadyExists` if another program listens on one of them, and `InvalidArgument` if one of them or its
        host cannot be listened on."""
        for variable, text in self.to_environment().items():
            service = "INFERENCE" if "INFERENCE" in variable else "TRAINER"
            host = listening_host(environment, service)
            Address(host, int(text), f"GPTLOOP_{service}_HOST", variable).listener().close()


def read_ports(environment: Environment) -> Ports:
    """The ports from the environment; raises `InvalidArgument` on a bad number and where two are the same."""
    defaults = Ports().to_environment()
    chosen = {
        name: read_int(environment, name, int(default), minimum=1, maximum=65535) for name, default in defaults.items()
    }
    port, uses = Counter(chosen.values()).most_common(1)[0]
    if uses > 1:
        names = " and ".join(name for name, value in chosen.items() if value == port)
        raise InvalidArgument(f"{names} are the same port, {port}, but each needs one of its own.")
    return Ports(*chosen.values())


def free_ports() -> Ports:
    """Four ports that nothing listens on now."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        return Ports(*(listener.getsockname()[1] for listener in listeners))


def listening_host(environment: Environment, service: str) -> str:
    """The address that a service (`INFERENCE`, `TRAINER`) listens on."""
    return read_str(environment, f"GPTLOOP_{service}_HOST", "127.0.0.1")
