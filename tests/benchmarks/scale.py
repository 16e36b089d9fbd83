"""Calculates how far many machines go, from figures that were measured (deploy/scale.md).

`python -m tests.benchmarks.scale`: 100 GPUs and 1,000 inference servers. Each figure below says where it comes from;
correct it there and run this again.
"""

from dataclasses import dataclass

from shared.gpt.config import count_parameters
from shared.service import cli
from shared.service.lists import print_rows
from shared.text import format_size
from trainer_service.presets import PRESETS

GPUS = 100
SERVERS = 1000

_CONFIG = PRESETS["tinystories-53m"]
_PARAMETERS = count_parameters(_CONFIG.gpt).total
_CONTEXT = _CONFIG.context_length
# A version: fp32 weights. A state: with the two moments of the optimizer.
VERSION_BYTES, STATE_BYTES = 4 * _PARAMETERS, 12 * _PARAMETERS

# A step on an H100 by rows of 512 tokens, in seconds: `python -m tests.benchmarks.train`, dropout 0.1.
_STEP_S = {12: 0.0110, 64: 0.0237}
# What a collective costs whatever its size: 99 of them took 7.7 ms on two H100s.
_COLLECTIVE_S = 78e-6
# A hop between machines, assumed.
_HOP_S = 10e-6


@dataclass(frozen=True)
class Network:
    """What carries gradients: bytes a second of each rank, in each direction."""

    name: str
    bytes_per_s: float


NETWORKS = (
    # 53M numbers in fp32, 212 MB, in 0.89 ms between two H200s: `python -m tests.benchmarks.scaling`.
    Network("NVLink, two measured", 238e9),
    Network("400 Gb/s for each GPU", 50e9),
    Network("100 Gb/s for each GPU", 12.5e9),
    Network("25 Gb/s for each GPU", 3.1e9),
)


def step_s(rows: float) -> float:
    """Returns the time in which one GPU computes a step of this many rows: a line through the two measured ones."""
    (few, few_s), (many, many_s) = _STEP_S.items()
    return few_s + (rows - few) * (many_s - few_s) / (many - few)


def all_reduce_s(ranks: int, network: Network) -> float:
    """Returns the time in which a ring adds the fp32 gradients of all ranks: each sends 2 (ranks - 1) / ranks of them
    (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations")."""
    if ranks == 1:
        return 0.0
    sent = 2 * (ranks - 1) / ranks * 4 * _PARAMETERS
    return _COLLECTIVE_S + sent / network.bytes_per_s + 2 * (ranks - 1) * _HOP_S


def efficiency(ranks: int, rows: float, network: Network) -> float:
    """Returns the share of a step in which a rank computes, if nothing overlaps."""
    return step_s(rows) / (step_s(rows) + all_reduce_s(ranks, network))


def pause_share(ranks: int, network: Network, bytes_per_s: float) -> float:
    """Returns the share of the time in which all ranks wait for rank 0, which writes a version and a state after each
    evaluation, with 64 rows a rank."""
    pause_s = (VERSION_BYTES + STATE_BYTES) / bytes_per_s
    return pause_s / (pause_s + _CONFIG.evaluation_interval * (step_s(64) + all_reduce_s(ranks, network)))


def training_rows() -> list[list[str]]:
    """Returns for each network, with 8 GPUs and with all: the time of the sum, the efficiency with 64 rows for each GPU
    (weak scaling), and with 512 rows together (strong scaling)."""
    rows = []
    for network in NETWORKS:
        row = [network.name]
        for ranks in (8, GPUS):
            row.append(f"{all_reduce_s(ranks, network) * 1e3:.1f} ms")
            row.append(f"{efficiency(ranks, 64, network):.0%}")
            together_s = step_s(512 / ranks) + all_reduce_s(ranks, network)
            row.append(f"{512 / 64 * step_s(64) / (ranks * together_s):.0%}")
        rows.append(row)
    return rows


def pause_rows() -> list[list[str]]:
    """Returns how long a checkpoint takes at several speeds of writing, and the share of the time that it costs."""
    return [
        [f"{speed / 1e9:g} GB/s", f"{(VERSION_BYTES + STATE_BYTES) / speed:.1f} s"]
        + [f"{pause_share(ranks, NETWORKS[1], speed):.0%}" for ranks in (1, 8, GPUS)]
        for speed in (0.2e9, 1e9, 5e9)
    ]


@dataclass(frozen=True)
class Asked:
    """What one of something asks: seconds of a core of Redis and of the trainer, each second or each call."""

    redis_s: float
    trainer_s: float = 0.0


# `python -m tests.benchmarks.redis_load`, on two cores that others used too.
WAITING_WORKER = Asked(483e-6)
RUNNING_JOB = Asked(997e-6)
WATCH = Asked(267e-6, 5.1e-3)
CALL = Asked(45e-6, 2.0e-3)


def service_rows() -> list[list[str]]:
    """Returns what all of it asks of Redis and of the trainer, as shares of the one core that each can use, and how
    many of each kind alone would fill one of the two."""
    parts = {
        f"{GPUS} workers, each with a job": Asked(WAITING_WORKER.redis_s + RUNNING_JOB.redis_s),
        f"{GPUS} clients that watch a job": WATCH,
        f"{GPUS} calls a second": CALL,
    }
    return [
        [
            name,
            f"{GPUS * each.redis_s:.0%}",
            f"{GPUS * each.trainer_s:.0%}",
            f"{1 / max(each.redis_s, each.trainer_s):,.0f}",
        ]
        for name, each in parts.items()
    ]


def copy_rows() -> list[list[str]]:
    """Returns how long all servers need to copy a version, by what the store gives in all."""
    all_bytes = SERVERS * VERSION_BYTES
    return [
        [name, f"{speed / 1e9:g} GB/s", f"{all_bytes / speed:.1f} s"]
        for name, speed in (
            ("one machine with 10 Gb/s", 1.25e9),
            ("ten machines with 25 Gb/s", 31e9),
            ("S3, each server 1 GB/s", SERVERS * 1e9),
        )
    ]


# What a look at a registry in which nothing changes asks: `python -m tests.benchmarks.registry_load`.
_READS_OF_A_LOOK = 3
_LISTS_BESIDE_VERSIONS = 1
_NAMES_OF_A_LIST = 1000
# What Amazon promises for one prefix, and its list prices of a read and of a list in dollars.
_READS_PER_S = 5500
_READ_DOLLARS, _LIST_DOLLARS = 0.4e-6, 5e-6


def look_rows() -> list[list[str]]:
    """Returns what the looks of all servers ask of S3, by the versions of the registry and the interval of looks: their
    requests a second, the share of what one prefix takes, and the dollars of a month."""
    rows = []
    for versions in (100, 10_000):
        lists = _LISTS_BESIDE_VERSIONS + -(-versions // _NAMES_OF_A_LIST)
        for interval_s in (1, 10, 60):
            looks_per_s = SERVERS / interval_s
            requests_per_s = looks_per_s * (lists + _READS_OF_A_LOOK)
            dollars = looks_per_s * (lists * _LIST_DOLLARS + _READS_OF_A_LOOK * _READ_DOLLARS) * 30 * 24 * 3600
            share = f"{requests_per_s / _READS_PER_S:.0%}"
            rows.append([f"{versions:,}", f"{interval_s} s", f"{requests_per_s:,.0f}", share, f"${dollars:,.0f}"])
    return rows


def main() -> None:
    """Prints the tables."""
    print(f"tinystories-53m: {format_size(VERSION_BYTES)} a version, {format_size(STATE_BYTES)} a state.")
    headings = [f"{what}, {ranks}" for ranks in (8, GPUS) for what in ("sum", "weak", "strong")]
    print_rows(["network", *headings], training_rows())
    print_rows(["writes", "a checkpoint", "1 GPU", "8", str(GPUS)], pause_rows())
    print_rows(["asked by", "Redis", "trainer", "most, alone"], service_rows())
    print_rows(["versions", "a look each", "requests/s", "of a prefix of S3", "a month"], look_rows())
    print_rows(["store", "gives", f"{SERVERS:,} copies of a version"], copy_rows())


if __name__ == "__main__":
    cli.end(main)
