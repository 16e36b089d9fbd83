"""The settings of the inference service."""

import re
from dataclasses import dataclass, field

from shared.decoding.weight_format import DEFAULT_WEIGHTS, WeightFormat
from shared.errors import InvalidArgument, shown
from shared.registry.decisions import BestBy
from shared.service.access.exposure import read_insecure
from shared.service.access.tls import TlsFiles, read_tls
from shared.service.access.tokens import CLIENT_TOKENS_VARIABLE, TokenSettings, read_token_settings
from shared.service.settings import (
    Directories,
    Environment,
    read_best_by,
    read_choice,
    read_directories,
    read_float,
    read_int,
    read_port,
    read_str,
)

HOST_VARIABLE = "GPTLOOP_INFERENCE_HOST"
PORT_VARIABLE = "GPTLOOP_INFERENCE_PORT"
METRICS_HOST_VARIABLE = "GPTLOOP_INFERENCE_METRICS_HOST"
METRICS_PORT_VARIABLE = "GPTLOOP_INFERENCE_METRICS_PORT"
HTTP_PORT_VARIABLE = "GPTLOOP_INFERENCE_HTTP_PORT"
_WEIGHTS = "GPTLOOP_INFERENCE_WEIGHTS"
PROBE_PORT_VARIABLE = "GPTLOOP_INFERENCE_PROBE_PORT"

_HOST = re.compile(r"[A-Za-z0-9._-]+")
# As browsers write it.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Settings:
    """Every setting with its default; `read_settings` names the environment variables."""

    directories: Directories
    # The address on which gRPC and HTTP listen.
    host: str = "127.0.0.1"
    # The gRPC port; 0 lets the system choose.
    port: int = 50051
    # The address on which the metrics page and probes are answered, without TLS.
    metrics_host: str = "127.0.0.1"
    # The port of the metrics page; 0 lets the system choose.
    metrics_port: int = 9101
    # The port of OpenAI's API and of the page; 0 lets the system choose.
    http_port: int = 8080
    # The port of probes that speak no TLS; None: there is none.
    probe_port: int | None = None
    # The certificate of gRPC and HTTP; None: they speak no TLS.
    tls: TlsFiles | None = None
    # The files of tokens, without which everybody may call.
    tokens: TokenSettings = field(default_factory=TokenSettings)
    # Whether other machines may reach the server although TLS or tokens are missing.
    insecure: bool = False
    # Names, besides addresses and localhost, by which clients call the server over HTTP.
    http_hosts: tuple[str, ...] = ()
    # Other sites, such as https://example.org, whose pages may call the server.
    http_origins: tuple[str, ...] = ()
    # Streams that a version decodes at the same time.
    slots: int = 8
    # Threads that compute a step on a CPU. One thread leaves the other cores to training.
    threads: int = 1
    # The format of weights on a CPU. None: the default; a GPU has a format of its own.
    weights: WeightFormat | None = None
    # Most prompt tokens that a step reads beside the tokens of running streams. None: chosen by the device.
    prefill_tokens: int | None = None
    # Memory in MiB in which each version caches the prefixes of prompts.
    prefix_cache_mib: int = 128
    # Samples that may wait for a slot, and requests that may wait for a version; more are RESOURCE_EXHAUSTED.
    max_waiting_requests: int = 256
    # Prompt tokens that may wait for a slot, over all requests.
    max_waiting_prompt_tokens: int = 65536
    # How often the server looks for a better version in the registry.
    poll_interval_s: float = 1.0
    # Versions in memory at once.
    resident_versions: int = 2
    # Nats per token by which the held-out loss of a version may exceed that of its predecessor.
    gate_margin: float = 0.05
    # How long a client may take to read a message before its stream ends.
    slow_reader_s: float = 10.0
    # How long a step of the engine may take before the process ends.
    stuck_after_s: float = 10.0
    # Samples that each named client may have at once, and tokens that it may use in a minute; 0: no limit.
    client_streams: int = 0
    client_tokens_per_minute: int = 0
    # How long running streams may continue after the first signal to stop.
    drain_s: float = 30.0
    # What the label `best` compares.
    best_by: BestBy = BestBy.TRAINING

    @property
    def missing_tokens(self) -> tuple[str, ...]:
        """Returns the variables of tokens that are not set."""
        return self.tokens.missing


def prefill_tokens_on(backend: str) -> int:
    """Returns the default of `prefill_tokens`: a CPU reads 64 tokens in about the time of a decode step."""
    return 64 if backend == "cpu" else 512


def read_settings(environment: Environment) -> Settings:
    """Reads the settings from an environment; raises `InvalidArgument` that names the wrong variable."""
    default = Settings(read_directories(environment))
    tokens = read_token_settings(environment)

    def read_count(name: str, value: int, minimum: int, maximum: int) -> int:
        return read_int(environment, f"GPTLOOP_INFERENCE_{name}", value, minimum=minimum, maximum=maximum)

    def read_limit(name: str, value: int, maximum: int) -> int:
        limit = read_count(name, value, 0, maximum)
        if limit and tokens.clients is None:
            raise InvalidArgument(
                f"GPTLOOP_INFERENCE_{name} is {limit}, but limits only clients that a token names; set "
                f"{CLIENT_TOKENS_VARIABLE} too."
            )
        return limit

    def read_seconds(name: str, value: float, minimum: float, maximum: float = 3600.0) -> float:
        return read_float(environment, f"GPTLOOP_INFERENCE_{name}", value, minimum=minimum, maximum=maximum)

    return Settings(
        directories=default.directories,
        host=read_str(environment, HOST_VARIABLE, default.host),
        port=read_port(environment, PORT_VARIABLE, default.port),
        metrics_port=read_port(environment, METRICS_PORT_VARIABLE, default.metrics_port),
        http_port=read_port(environment, HTTP_PORT_VARIABLE, default.http_port),
        metrics_host=read_str(environment, METRICS_HOST_VARIABLE, default.metrics_host),
        probe_port=read_int(environment, PROBE_PORT_VARIABLE, None, minimum=0, maximum=65535),
        tls=read_tls(environment),
        tokens=tokens,
        insecure=read_insecure(environment),
        http_hosts=_read_names(
            environment, "GPTLOOP_INFERENCE_HTTP_HOSTS", _HOST, "a name without scheme and port, such as models.example"
        ),
        http_origins=_read_names(
            environment,
            "GPTLOOP_INFERENCE_HTTP_ORIGINS",
            _ORIGIN,
            "a scheme, a name in small letters and perhaps a port, without a path, such as https://example.org",
        ),
        slots=read_count("SLOTS", default.slots, 2, 1024),
        threads=read_count("THREADS", default.threads, 1, 1024),
        weights=read_choice(environment, _WEIGHTS, WeightFormat) if read_str(environment, _WEIGHTS, "") else None,
        prefill_tokens=read_int(environment, "GPTLOOP_INFERENCE_PREFILL_TOKENS", None, minimum=64, maximum=1 << 20),
        prefix_cache_mib=read_count("PREFIX_CACHE_MIB", default.prefix_cache_mib, 0, 1 << 20),
        max_waiting_requests=read_count("MAX_WAITING_REQUESTS", default.max_waiting_requests, 1, 1_000_000),
        max_waiting_prompt_tokens=read_count(
            "MAX_WAITING_PROMPT_TOKENS", default.max_waiting_prompt_tokens, 1, 1_000_000_000
        ),
        poll_interval_s=read_seconds("POLL_INTERVAL_S", default.poll_interval_s, 0.01),
        resident_versions=read_count("RESIDENT_VERSIONS", default.resident_versions, 2, 16),
        gate_margin=read_float(
            environment, "GPTLOOP_INFERENCE_GATE_MARGIN", default.gate_margin, minimum=0.0, maximum=100.0
        ),
        slow_reader_s=read_seconds("SLOW_READER_S", default.slow_reader_s, 0.1),
        stuck_after_s=read_seconds("STUCK_AFTER_S", default.stuck_after_s, 1.0),
        client_streams=read_limit("CLIENT_STREAMS", default.client_streams, 1_000_000),
        client_tokens_per_minute=read_limit(
            "CLIENT_TOKENS_PER_MINUTE", default.client_tokens_per_minute, 1_000_000_000
        ),
        # `deploy/supervisord.conf` waits a little longer.
        drain_s=read_seconds("DRAIN_S", default.drain_s, 0.0, 60.0),
        best_by=read_best_by(environment),
    )


def weights_on(backend: str, chosen: WeightFormat | None) -> WeightFormat | None:
    """Returns the format of weights on a device, None on a GPU; raises `InvalidArgument` if one was chosen there."""
    if backend == "cpu":
        return chosen or DEFAULT_WEIGHTS
    if chosen is not None:
        raise InvalidArgument(
            f"{_WEIGHTS} is {chosen}, but this server computes on a GPU, where the format is not chosen; unset it."
        )
    return None


def device_kind(backend: str, weights: WeightFormat | None) -> str:
    """Returns the kind of device for which a finding holds: on a CPU with the format of weights, as in `cpu_int8`."""
    return backend if weights is None else f"{backend}_{weights}"


def _read_names(environment: Environment, name: str, form: re.Pattern[str], described: str) -> tuple[str, ...]:
    """Reads names with spaces between them; raises `InvalidArgument` for one that no request would ever have."""
    names = tuple(read_str(environment, name, "").split())
    for each in names:
        if not form.fullmatch(each):
            raise InvalidArgument(f"{name} has {shown(each)}, but must have {described}.")
    return names
