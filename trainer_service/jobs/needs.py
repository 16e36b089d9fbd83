"""What a job needs of the worker that takes it, and what a worker has."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Self

from shared.device.gpus import gpu_memories_bytes
from shared.device.machine import cores, memory_limit_bytes
from shared.errors import InvalidArgument, shown
from shared.registry.manifest import typed
from shared.service.settings import parse_bytes
from shared.text import format_size

_MAX_BYTES = 1 << 50


@dataclass(frozen=True)
class Needs:
    """What a job needs: whether each rank computes on a GPU, the memory of each device, and the number of ranks.

    place: the folder that has what a large teacher was paid for, as `place_of` names it; empty: any.
    """

    gpu: bool = False
    memory_bytes: int = 0
    ranks: int = 1
    place: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `gpu,memory=16G`; raises `InvalidArgument` if the text has another form."""
        gpu, memory_bytes = False, 0
        for word in filter(None, (each.strip() for each in text.split(","))):
            name, _, size = word.partition("=")
            if word == "gpu" and not gpu:
                gpu = True
                continue
            # Both 16G and 16GB.
            value = parse_bytes(size.removesuffix("B")) if name == "memory" and not memory_bytes else None
            if not value or value > _MAX_BYTES:
                raise InvalidArgument(
                    f"needs is {shown(text)}, but must be gpu, memory=<size> or both, each once, as in gpu,memory=16G."
                )
            memory_bytes = value
        return cls(gpu, memory_bytes)

    def to_text(self) -> str:
        """Returns the shortest text that `parse` reads, which says nothing of ranks and place."""
        size, unit = self.memory_bytes, ""
        for larger in "KMGT":
            if size % 1024 == 0:
                size, unit = size // 1024, larger
        return ",".join(["gpu"] * self.gpu + [f"memory={size}{unit}"] * bool(self.memory_bytes))

    def __str__(self) -> str:
        ranks = f"{self.ranks} ranks" if self.ranks > 1 else ""
        gpus = ("a GPU" if self.ranks == 1 else "a GPU for each") if self.gpu else ""
        memory = f"{format_size(self.memory_bytes)} of memory" if self.memory_bytes else ""
        place = f"the data folder {shown(self.place, 20)} of its large teacher" if self.place else ""
        return ", ".join(filter(None, (ranks, gpus, memory, place)))


@dataclass(frozen=True)
class Offer:
    """What a worker has: how many ranks it can start and how many of them get a GPU, the memory of a device, and the
    id of its folder of data."""

    gpus: int = 0
    memory_bytes: int = 0
    ranks: int = 1
    place: str = ""

    @classmethod
    def of_this_machine(cls, ranks: int | None, launcher: bool, place: str = "") -> Self:
        """Returns what a worker on this machine has. `ranks` replaces the number of its GPUs, or else of its cores.

        A launcher starts ranks on other machines, which are taken to be like this one.
        """
        memories = gpu_memories_bytes()
        count = ranks or len(memories) or cores()
        gpus = count if launcher and memories else len(memories)
        return cls(gpus, min(memories, default=memory_limit_bytes()), count, place)

    def meets(self, needs: Needs) -> bool:
        """Whether this is enough for a job."""
        return (
            self.ranks >= needs.ranks
            and (self.gpus >= needs.ranks or not needs.gpu)
            and self.memory_bytes >= needs.memory_bytes
            and needs.place in ("", self.place)
        )

    def to_json(self) -> str:
        """Returns the text that Redis stores."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what `to_json` writes; any other text, which other programs may have written, offers nothing."""
        try:
            return cls(**typed(cls, json.loads(text)))
        except (ValueError, TypeError, AttributeError, RecursionError):
            return cls()

    def __str__(self) -> str:
        gpus = f", {self.gpus} with a GPU" if self.gpus else ""
        return f"up to {self.ranks} ranks{gpus}, {format_size(self.memory_bytes)} of memory"


def awaited_worker(needs: Needs, offers: Collection[Offer]) -> str:
    """Says which worker a job waits for if none of some offers meets its needs; returns nothing otherwise."""
    if needs == Needs() or any(offer.meets(needs) for offer in offers):
        return ""
    return f"a worker with {needs}"
