"""A version in memory."""

from dataclasses import dataclass

from shared.decoding.weight_format import WeightFormat
from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest


@dataclass(frozen=True, eq=False)
class Resident:
    """A version in memory. `loss` is that of its held-out windows in nats a token, as it is served, and `weights` the
    format in which it computes."""

    manifest: VersionManifest
    tokenizer: Tokenizer
    loss: float
    memory_bytes: int
    weights: WeightFormat

    @property
    def context_length(self) -> int:
        """The length of its context, in tokens."""
        return int(self.manifest.model["context_length"])
