"""Records of evaluations for tests, with the figures that the registry reads and nothing else."""

import json

from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry


def record(version_digest: str, bits_per_byte: float, measured_at: float, **text: object) -> str:
    """Returns the text of a record; `text` replaces figures."""
    figures = {"nats_per_token": 2.0, "perplexity": 7.4, "bits_per_byte": bits_per_byte, "interval": None}
    return json.dumps(
        {
            "version": {"digest": version_digest},
            "method": {"text": {"tokens": 1000}},
            "text": figures | text,
            "measured_at": {"text": measured_at},
        }
    )


def write_record(
    registry: Registry,
    version: VersionManifest,
    bits_per_byte: float,
    method: str = "aa",
    measured_at: float = 100.0,
    **text: object,
) -> None:
    """Writes a record of a version by a method."""
    written = record(version.digest, bits_per_byte, measured_at, **text)
    registry.evaluations.write(version.version, method, written)
