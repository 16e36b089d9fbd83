"""The settings of the inference service."""

from dataclasses import dataclass

from shared.settings import Directories, Environment, read_directories, read_float, read_int, read_port, read_str

PORT_VARIABLE = "GPTLOOP_INFERENCE_PORT"
METRICS_PORT_VARIABLE = "GPTLOOP_INFERENCE_METRICS_PORT"


@dataclass(frozen=True)
class Settings:
    """Every setting, with its default; `read_settings` names the variables."""

    directories: Directories
    # The address on which gRPC and the metrics page listen.
    host: str = "127.0.0.1"
    # The gRPC port; 0 lets the system choose.
    port: int = 50051
    # The port of the metrics page; 0 lets the system choose.
    metrics_port: int = 9101
    # Streams that one version decodes together.
    slots: int = 8
    # Requests that may wait for a slot; one more is refused with RESOURCE_EXHAUSTED.
    max_waiting_requests: int = 256
    # Prompt tokens that may wait for a slot, all requests together.
    max_waiting_prompt_tokens: int = 65536
    # How often the registry is looked at for a better version.
    poll_interval_s: float = 1.0
    # Versions in memory at once: the serving one, and those on which streams still run.
    resident_versions: int = 2


def read_settings(environment: Environment) -> Settings:
    """The settings of an environment; raises `InvalidArgument` and names the variable that is wrong."""
    default = Settings(read_directories(environment))

    def read_count(name: str, value: int, minimum: int, maximum: int) -> int:
        return read_int(environment, f"GPTLOOP_INFERENCE_{name}", value, minimum=minimum, maximum=maximum)

    return Settings(
        directories=default.directories,
        host=read_str(environment, "GPTLOOP_INFERENCE_HOST", default.host),
        port=read_port(environment, PORT_VARIABLE, default.port),
        metrics_port=read_port(environment, METRICS_PORT_VARIABLE, default.metrics_port),
        slots=read_count("SLOTS", default.slots, 2, 1024),
        max_waiting_requests=read_count("MAX_WAITING_REQUESTS", default.max_waiting_requests, 1, 1_000_000),
        max_waiting_prompt_tokens=read_count(
            "MAX_WAITING_PROMPT_TOKENS", default.max_waiting_prompt_tokens, 1, 1_000_000_000
        ),
        poll_interval_s=read_float(
            environment, "GPTLOOP_INFERENCE_POLL_INTERVAL_S", default.poll_interval_s, minimum=0.01, maximum=3600.0
        ),
        resident_versions=read_count("RESIDENT_VERSIONS", default.resident_versions, 2, 16),
    )
