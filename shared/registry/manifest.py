"""What a checkpoint says of itself: one `manifest.json` in every state and every version."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

from shared.errors import CorruptCheckpoint

MANIFEST_NAME = "manifest.json"
# Stands where a version names its preset if it was imported, or continues one that was.
IMPORTED = "imported"
# The end of the year 9999, in seconds since the epoch.
_LATEST_S = 253402300800
# Under this name a manifest holds the SHA-256 of all its other values.
_DIGEST_NAME = "sha256"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint, as it was when it was committed."""

    name: str
    size_bytes: int
    sha256: str


class _Manifest:
    """Reading and writing, the same for both kinds."""

    files: tuple[FileRecord, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(record.size_bytes for record in self.files)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all values, those of the files among them, in hexadecimal."""
        return _digest(asdict(self))  # type: ignore[call-overload]

    def to_json(self) -> str:
        """As `manifest.json` holds it."""
        values = asdict(self)  # type: ignore[call-overload]
        return json.dumps(values | {_DIGEST_NAME: self.digest}, indent=2, sort_keys=True)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a checkpoint's folder; raises `CorruptCheckpoint` where it cannot be understood."""
        path = directory / MANIFEST_NAME
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path} cannot be understood: {error}.") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From what `manifest.json` holds; unknown names are left out, so that a newer writer can add some.

        Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` for anything else.
        """
        values = json.loads(text)
        if values.pop(_DIGEST_NAME) != _digest(values):
            raise ValueError("it was changed after it was written")
        if not 0 <= values["created_at"] < _LATEST_S:
            raise ValueError(f"created_at is {values['created_at']}")
        values["files"] = [FileRecord(**typed(FileRecord, record)) for record in values["files"]]
        return cls(**typed(cls, values))


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def typed(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from what JSON holds; raises `KeyError` or `TypeError` where one is missing or odd."""
    typed = {}
    for field in fields(owner):
        value, kind = values[field.name], get_origin(field.type) or field.type
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        # A float that was whole may stand as a whole number.
        kinds = get_args(field.type) if kind is UnionType else (kind, int if kind is float else kind)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r}")
        typed[field.name] = value
    return typed


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
