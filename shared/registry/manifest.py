"""What a checkpoint says of itself: one `manifest.json` in every state and every version."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from shared.errors import CorruptCheckpoint

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint, as it was when it was committed."""

    name: str
    size_bytes: int
    sha256: str


class _Manifest:
    """Reading and writing, the same for both kinds."""

    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        """As `manifest.json` holds it."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)  # type: ignore[call-overload]

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a checkpoint's folder; raises `CorruptCheckpoint` where it cannot be understood."""
        path = directory / MANIFEST_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_values(values)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error}.") from error

    @classmethod
    def from_values(cls, values: Mapping[str, object]) -> Self:
        """From what JSON holds; unknown names are left out, so that a newer writer can add some."""
        known = {field.name: values[field.name] for field in fields(cls)}  # type: ignore[arg-type]
        known["files"] = tuple(FileRecord(**record) for record in known["files"])  # type: ignore[attr-defined]
        return cls(**known)


@dataclass(frozen=True)
class StateManifest(_Manifest):
    """A state: everything a run needs to go on from a step."""

    run: str
    step: int
    created_at: float
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class VersionManifest(_Manifest):
    """A version: everything a server needs to serve it, and how good it claims to be.

    Losses are in nats per token. `claimed_loss` is that on the windows in `evaluation.npy`; losses compare only between
    versions of one `evaluation_set`. Times are seconds since the epoch.
    """

    version: int
    run: str
    step: int
    parent: int | None
    created_at: float
    preset: str
    model: Mapping[str, int | float | bool]
    parameters: int
    training: Mapping[str, object]
    tokenizer: str
    tokenizer_digest: str
    dataset: str
    dataset_revision: str
    dataset_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    evaluation_set: str
    training_loss: float
    validation_loss: float
    bits_per_byte: float
    claimed_loss: float
    files: tuple[FileRecord, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(record.size_bytes for record in self.files)
