"""Finds out from the environment which rank of a run this process is. Importing this loads no model framework.

Every launcher sets variables of its own: mlx.launch those of MLX, mpirun, srun and Kubernetes theirs. A worker that
starts ranks itself sets those of Kubernetes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.errors import InvalidArgument, shown
from shared.service.settings import Environment, read_int, read_str
from trainer_service.settings import MAX_RANKS

INDEX_VARIABLE = "JOB_COMPLETION_INDEX"
HOSTS_VARIABLE = "GPTLOOP_RANK_HOSTS"
PORT_VARIABLE = "GPTLOOP_RANK_PORT"
DEFAULT_PORT = 50070

# The variables of each launcher: the rank, the number of ranks, and the rank among those of the same machine.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
# What Open MPI calls its library; the name without a number exists only where programs are compiled for it.
_MPI_LIBRARY = "libmpi.so.40"


@dataclass(frozen=True)
class Place:
    """The rank of this process, the number of ranks, and where they meet.

    meeting: the host and the port at which rank 0 waits for the others; None: MPI knows where they are.
    local_rank: the rank among those of this machine, if the launcher says so.
    has_variables: whether MLX's own variables are set already.
    """

    rank: int
    count: int
    meeting: tuple[str, int] | None = None
    local_rank: int | None = None
    has_variables: bool = False

    def variables(self, backend: str, addresses: list[str], folder: Path) -> dict[str, str]:
        """Returns the variables that MLX reads, for a device of this kind; writes the list of addresses into `folder`.

        addresses: `host:port` of each rank, as the meeting found them; without a meeting there are none.
        """
        if self.has_variables:
            return {}
        if not addresses:
            return {"MLX_MPI_LIBNAME": _MPI_LIBRARY}
        if backend == "cuda":
            host, _, port = addresses[0].rpartition(":")
            own = {"MLX_WORLD_SIZE": str(self.count), "NCCL_HOST_IP": host, "NCCL_PORT": port}
        else:
            path = folder / "ranks.json"
            path.write_text(json.dumps([[address] for address in addresses]), encoding="utf-8")
            own = {"MLX_HOSTFILE": str(path)}
        return {"MLX_RANK": str(self.rank), **own}


def find_place(environment: Environment) -> Place:
    """Returns the place of this process; raises `InvalidArgument` if the environment does not say it."""
    if "MLX_RANK" in environment:
        return _of_mlx(environment)
    for names in _LAUNCHERS:
        if all(name in environment for name in names[:2]):
            return _of_launcher(environment, *names)
    if INDEX_VARIABLE in environment:
        hosts = _hosts(environment)
        if not hosts:
            raise InvalidArgument(
                f"{INDEX_VARIABLE} is set, but {HOSTS_VARIABLE} is not: it must list the host of each rank, separated "
                "by commas."
            )
        rank = _rank(environment, INDEX_VARIABLE, len(hosts))
        return Place(rank, len(hosts), (hosts[0], _port(environment)))
    raise InvalidArgument(
        "No variable says which rank this process is: start it by mlx.launch, mpirun or srun, or set "
        f"{INDEX_VARIABLE} and {HOSTS_VARIABLE}."
    )


def without_place(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment without the variables of any launcher, for ranks that get a place of their own."""
    foreign = re.compile(r"MLX_(RANK|HOSTFILE|WORLD_SIZE)|NCCL_(HOST_IP|PORT)|(OMPI|PMI|PMIX|SLURM)_\w+")
    own = (INDEX_VARIABLE, HOSTS_VARIABLE, PORT_VARIABLE)
    return {name: text for name, text in environment.items() if name not in own and not foreign.fullmatch(name)}


def _of_mlx(environment: Environment) -> Place:
    if path := environment.get("MLX_HOSTFILE"):
        try:
            hosts = [[_address(text) for text in each] for each in json.loads(Path(path).read_text(encoding="utf-8"))]
            meeting = hosts[0][0]
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise InvalidArgument(
                f"MLX_HOSTFILE names {shown(path)}, which must be a list of lists of addresses, such as "
                f'[["10.0.0.1:5000"], ["10.0.0.2:5000"]]: {shown(error, 120)}.'
            ) from None
        return Place(_rank(environment, "MLX_RANK", len(hosts)), len(hosts), meeting, has_variables=True)
    missing = [name for name in ("MLX_WORLD_SIZE", "NCCL_HOST_IP", "NCCL_PORT") if name not in environment]
    if missing:
        raise InvalidArgument(
            f"MLX_RANK is set, but {' and '.join(missing)} is not: MLX needs MLX_HOSTFILE, or MLX_WORLD_SIZE, "
            "NCCL_HOST_IP and NCCL_PORT."
        )
    count = _count(environment, "MLX_WORLD_SIZE")
    port = read_int(environment, "NCCL_PORT", DEFAULT_PORT, minimum=1, maximum=65535)
    meeting = (environment["NCCL_HOST_IP"], port)
    return Place(_rank(environment, "MLX_RANK", count), count, meeting, has_variables=True)


def _of_launcher(environment: Environment, rank_name: str, count_name: str, local_name: str) -> Place:
    count = _count(environment, count_name)
    rank = _rank(environment, rank_name, count)
    local_rank = read_int(environment, local_name, None, minimum=0, maximum=MAX_RANKS)
    hosts = _hosts(environment)
    if hosts and len(hosts) != count:
        raise InvalidArgument(
            f"{HOSTS_VARIABLE} lists {len(hosts)} hosts, but {count_name} is {count}: it must list the host of each "
            "rank."
        )
    if not hosts and rank_name == "SLURM_PROCID":
        hosts = [_first_node(environment)]
    return Place(rank, count, (hosts[0], _port(environment)) if hosts else None, local_rank)


def _first_node(environment: Environment) -> str:
    """Returns the first of the nodes that Slurm lists, such as `gpu-01` of `gpu-[01-03,7],cpu1`; rank 0 runs there."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
    text = read_str(environment, name, "")
    match = re.match(r"(?P<prefix>[\w.-]+)(\[(?P<number>\d+)[\d,-]*\](?P<suffix>[\w.-]*))?(?=,|$)", text, re.ASCII)
    if match is None:
        raise InvalidArgument(f"{name} is {shown(text)}, but must be a list of nodes such as gpu-[01-03,7].")
    return f"{match['prefix']}{match['number'] or ''}{match['suffix'] or ''}"


def _hosts(environment: Environment) -> list[str]:
    text = read_str(environment, HOSTS_VARIABLE, "")
    hosts = [host.strip() for host in text.split(",")] if text else []
    if not all(re.fullmatch(r"[\w.-]+", host, re.ASCII) for host in hosts) or len(hosts) > MAX_RANKS:
        raise InvalidArgument(
            f"{HOSTS_VARIABLE} is {shown(text)}, but must be from 1 to {MAX_RANKS} names or IPv4 addresses, separated "
            "by commas."
        )
    return hosts


def _port(environment: Environment) -> int:
    return read_int(environment, PORT_VARIABLE, DEFAULT_PORT, minimum=1, maximum=65535)


def _count(environment: Environment, name: str) -> int:
    return read_int(environment, name, 0, minimum=1, maximum=MAX_RANKS)


def _rank(environment: Environment, name: str, count: int) -> int:
    return read_int(environment, name, 0, minimum=0, maximum=count - 1)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is not host:port")
    return host, int(port)
