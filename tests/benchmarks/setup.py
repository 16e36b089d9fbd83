"""The model, the resources and the server that an implementation generates with."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.checkpoint import Checkpoint


@dataclass(frozen=True)
class Endpoint:
    """The address of a server, the URL of its HTTP API, and the port of its metrics page."""

    address: str
    url: str
    metrics_port: int


@dataclass(frozen=True)
class Setup:
    """The folder of a `Checkpoint`, the number of streams that decode together, the number of compute threads, and a
    server with the same model, or None."""

    folder: str
    slots: int
    threads: int
    endpoint: Endpoint | None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Setup":
        """The inverse of `asdict`."""
        endpoint = values["endpoint"]
        return cls(**values | {"endpoint": None if endpoint is None else Endpoint(**endpoint)})

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint in the folder."""
        return Checkpoint(Path(self.folder))


def limit_threads(threads: int) -> None:
    """Limits the compute threads of processes that start from now on."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
