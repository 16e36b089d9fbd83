"""What the trainer service reads from the environment, once, at its start."""

import shlex
from dataclasses import dataclass

from shared.errors import InvalidArgument, shown
from shared.registry.decisions import BestBy
from shared.registry.registry import Registry
from shared.registry.retention import MAX_BYTES, MAX_COUNT, Retention
from shared.service.access.exposure import read_insecure
from shared.service.access.tls import TlsFiles, read_tls
from shared.service.access.tokens import OPERATOR_TOKENS_VARIABLE, TokenSettings, read_token_settings
from shared.service.settings import (
    Directories,
    Environment,
    read_best_by,
    read_bytes,
    read_directories,
    read_float,
    read_int,
    read_port,
    read_str,
)
from trainer_service.distillation.groq_settings import GroqSettings, read_groq
from trainer_service.redis_client import RedisAddress, read_redis

HOST_VARIABLE = "GPTLOOP_TRAINER_HOST"
PORT_VARIABLE = "GPTLOOP_TRAINER_PORT"
METRICS_HOST_VARIABLE = "GPTLOOP_TRAINER_METRICS_HOST"
METRICS_PORT_VARIABLE = "GPTLOOP_TRAINER_METRICS_PORT"
PROBE_PORT_VARIABLE = "GPTLOOP_TRAINER_PROBE_PORT"
LAUNCHER_VARIABLE = "GPTLOOP_LAUNCHER"
WORKER_RANKS_VARIABLE = "GPTLOOP_WORKER_RANKS"

# The most ranks that a run may have.
MAX_RANKS = 1024


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of the trainer service.

    host: `GPTLOOP_TRAINER_HOST`, the address that gRPC listens on.
    port: `GPTLOOP_TRAINER_PORT`, the gRPC port; 0 chooses a free one.
    metrics_host: `GPTLOOP_TRAINER_METRICS_HOST`, the address of `/metrics` and of probes, which speak no TLS.
    metrics_port: `GPTLOOP_TRAINER_METRICS_PORT`, the port of `/metrics`; 0 chooses a free one.
    probe_port: `GPTLOOP_TRAINER_PROBE_PORT`, the port of probes that speak no TLS; None: there is none.
    tls: `GPTLOOP_TLS_*`, the certificate of gRPC; None: it speaks no TLS.
    tokens: `GPTLOOP_CLIENT_TOKENS` and `GPTLOOP_OPERATOR_TOKENS`, the files of tokens.
    insecure: `GPTLOOP_INSECURE`, whether other machines may reach the server although TLS or tokens are missing.
    stuck_s: `GPTLOOP_TRAINER_STUCK_S`, how long a job may show no progress before another attempt replaces it.
    retention: `GPTLOOP_KEEP_*`, which versions and states the registry keeps.
    redis: `REDIS_URL` and `GPTLOOP_REDIS_PASSWORD_FILE`, the Redis server; without them the embedded one below
        `GPTLOOP_VAR`.
    directories: `GPTLOOP_VAR`, the folder of all state.
    best_by: `GPTLOOP_BEST_BY`, what the label `best` compares.
    groq: `GROQ_API_KEY` and `GPTLOOP_GROQ_*`, the large teacher.
    launcher: `GPTLOOP_LAUNCHER`, the words of the command that starts the ranks of a run; `{world_size}` in them stands
        for their number; empty: a worker starts them itself.
    worker_ranks: `GPTLOOP_WORKER_RANKS`, how many ranks a worker can start; None: as many as it has GPUs, or else
        cores.
    """

    host: str
    port: int
    metrics_host: str
    metrics_port: int
    probe_port: int | None
    tls: TlsFiles | None
    tokens: TokenSettings
    insecure: bool
    stuck_s: float
    retention: Retention
    redis: RedisAddress
    directories: Directories
    best_by: BestBy
    groq: GroqSettings
    launcher: tuple[str, ...]
    worker_ranks: int | None

    @property
    def missing_tokens(self) -> tuple[str, ...]:
        """Returns the variables of tokens that are not set; the trainer has operators only."""
        return tuple(name for name in self.tokens.missing if name == OPERATOR_TOKENS_VARIABLE)

    def open_registry(self) -> Registry:
        """Returns the registry."""
        return self.directories.open_registry(self.best_by)


def read_settings(environment: Environment) -> TrainerSettings:
    """Reads all settings; raises `InvalidArgument`, which names the invalid variable."""
    directories = read_directories(environment)
    launcher = _read_launcher(environment)
    worker_ranks = read_int(environment, WORKER_RANKS_VARIABLE, None, minimum=1, maximum=MAX_RANKS)
    if launcher and worker_ranks is None:
        raise InvalidArgument(
            f"{LAUNCHER_VARIABLE} is set, but {WORKER_RANKS_VARIABLE} is not: set it to the number of ranks that the "
            "launcher can start."
        )
    return TrainerSettings(
        host=read_str(environment, HOST_VARIABLE, "127.0.0.1"),
        port=read_port(environment, PORT_VARIABLE, 50052),
        metrics_host=read_str(environment, METRICS_HOST_VARIABLE, "127.0.0.1"),
        metrics_port=read_port(environment, METRICS_PORT_VARIABLE, 9102),
        probe_port=read_int(environment, PROBE_PORT_VARIABLE, None, minimum=0, maximum=65535),
        tls=read_tls(environment),
        tokens=read_token_settings(environment),
        insecure=read_insecure(environment),
        stuck_s=read_float(environment, "GPTLOOP_TRAINER_STUCK_S", 600.0, minimum=1.0, maximum=86400.0),
        retention=read_retention(environment),
        redis=read_redis(environment, directories),
        directories=directories,
        best_by=read_best_by(environment),
        groq=read_groq(environment),
        launcher=launcher,
        worker_ranks=worker_ranks,
    )


def _read_launcher(environment: Environment) -> tuple[str, ...]:
    text = read_str(environment, LAUNCHER_VARIABLE, "")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidArgument(
            f"{LAUNCHER_VARIABLE} is {shown(text)}, but must be a command line such as mpirun -n {{world_size}}: "
            f"{error}."
        ) from None


def read_retention(environment: Environment) -> Retention:
    """Reads the variables `GPTLOOP_KEEP_…`; raises `InvalidArgument`, which names the invalid variable."""
    default = Retention()

    def read(name: str, value: int, minimum: int = 0) -> int:
        return read_int(environment, name, value, minimum=minimum, maximum=MAX_COUNT)

    return Retention(
        states=read("GPTLOOP_KEEP_STATES", default.states, 1),
        best=read("GPTLOOP_KEEP_BEST", default.best),
        newest=read("GPTLOOP_KEEP_NEWEST", default.newest),
        every=read("GPTLOOP_KEEP_EVERY", default.every),
        runs=read("GPTLOOP_KEEP_RUNS", default.runs),
        size_bytes=read_bytes(environment, "GPTLOOP_KEEP_BYTES", default.size_bytes, maximum=MAX_BYTES),
    )
