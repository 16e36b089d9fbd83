"""A version in memory."""

from dataclasses import dataclass

from shared.gpt.tokenizer import Tokenizer
from shared.registry.manifest import VersionManifest


@dataclass(eq=False)
class Resident:
    """A version in memory, and how many streams run on it.

    A held one stays without any for an operator; one that is `leaving` goes with its last stream.
    """

    manifest: VersionManifest
    tokenizer: Tokenizer
    loss: float
    memory_bytes: int
    streams: int = 0
    held: bool = False
    leaving: bool = False

    @property
    def context_length(self) -> int:
        """The length of its context, in tokens."""
        return int(self.manifest.model["context_length"])
