"""The TCP ports of the services."""

from dataclasses import dataclass, fields

import inference_service.settings
import trainer_service.settings
from shared.errors import InvalidArgument
from shared.service.access.tls import read_tls
from shared.service.listening import Address, free_port_numbers
from shared.service.settings import Environment, reachable_address


@dataclass(frozen=True)
class Ports:
    """Where the services listen: gRPC and `/metrics` of each, and HTTP of the inference server."""

    inference: int
    inference_http: int
    inference_metrics: int
    trainer: int
    trainer_metrics: int

    def to_environment(self) -> dict[str, str]:
        """Returns the variables from which the services read these ports."""
        return {f"GPTLOOP_{name.upper()}_PORT": str(port) for name, port in vars(self).items()}

    def check_free(self, environment: Environment) -> None:
        """Raises `AlreadyExists` if another program listens on one of them, and `InvalidArgument` if the host or a port
        cannot be used."""
        for variable, text in self.to_environment().items():
            service = "INFERENCE" if "INFERENCE" in variable else "TRAINER"
            face = f"{service}_METRICS" if "METRICS" in variable else service
            host = listening_host(environment, face)
            Address(host, int(text), f"GPTLOOP_{face}_HOST", variable).listener().close()


def read_ports(environment: Environment) -> Ports:
    """Returns the ports in the settings of the services.

    Raises `InvalidArgument` if a setting is wrong or two ports are the same.
    """
    inference = inference_service.settings.read_settings(environment)
    trainer = trainer_service.settings.read_settings(environment)
    ports = Ports(inference.port, inference.http_port, inference.metrics_port, trainer.port, trainer.metrics_port)
    chosen = ports.to_environment()
    for name, text in chosen.items():
        if text == "0":
            raise InvalidArgument(f"{name} is 0, but must be from 1 to 65535.")
        same = [other for other, port in chosen.items() if port == text]
        if len(same) > 1:
            raise InvalidArgument(f"{' and '.join(same)} are the same port, {text}, but must be different.")
    return ports


def free_ports() -> Ports:
    """Returns ports that nothing listens on now."""
    return Ports(*free_port_numbers(len(fields(Ports))))


def page_url(environment: Environment, ports: Ports) -> str:
    """Returns where a browser on this machine finds the page."""
    scheme = "http" if read_tls(environment) is None else "https"
    return f"{scheme}://{reachable_address(listening_host(environment, 'INFERENCE'), ports.inference_http)}/"


def listening_host(environment: Environment, service: str) -> str:
    """Returns the address that a service (`INFERENCE`, `TRAINER`), or its metrics page (`…_METRICS`), listens on."""
    read = (
        inference_service.settings.read_settings if "INFERENCE" in service else trainer_service.settings.read_settings
    )
    settings = read(environment)
    return settings.metrics_host if "METRICS" in service else settings.host
