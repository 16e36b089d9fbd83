"""What an implementation is given to generate with."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.checkpoint import Checkpoint


@dataclass(frozen=True)
class Endpoint:
    """Where a server is asked, and the port of its metrics page."""

    address: str
    metrics_port: int


@dataclass(frozen=True)
class Setup:
    """The folder of a `Checkpoint`, how many streams decode together, in how many threads a step computes, and where a
    server has the same model, where one is asked."""

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
        """The model."""
        return Checkpoint(Path(self.folder))


def limit_threads(threads: int) -> None:
    """Makes processes that are started from now on compute in so many threads, whatever they multiply with."""
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(threads)
