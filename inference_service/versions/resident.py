"""A version in memory."""

from dataclasses import dataclass

from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest


@dataclass(frozen=True, eq=False)
class Resident:
    """A version in memory. `loss` is that of its held-out windows in nats a token, as it is served."""

    manifest: VersionManifest
    tokenizer: Tokenizer
    loss: float
    memory_bytes: int

    @property
    def context_length(self) -> int:
        """The length of its context, in tokens."""
        return int(self.manifest.model["context_length"])
