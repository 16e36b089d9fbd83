"""What a checkpoint says of itself: one `manifest.json` in every state and every version."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

from shared.errors import CorruptCheckpoint, shown
from shared.text import excerpt

MANIFEST_NAME = "manifest.json"
# Stands where a version names its preset if it was imported, or continues one that was.
IMPORTED = "imported"
# A run names a folder.
RUN_NAME = re.compile(r"\w[\w.-]{0,199}")
# Lists and messages carry what a manifest says: text of the length of a path, and numbers of 64 bits. A version may be
# of many files of text, each of which it names.
_MOST_BYTES = 64 << 20
_MOST_CHARACTERS = 4096
_MOST_NUMBER = 2**63 - 1
# Characters of the reason for which a manifest cannot be understood.
_REASON = 120
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

    run: str
    files: tuple[FileRecord, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files but the manifest."""
        return sum(record.size_bytes for record in self.files)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all values, those of the files among them, in hexadecimal."""
        return _digest(self._values())

    def to_json(self) -> str:
        """As `manifest.json` holds it."""
        values = self._values()
        return json.dumps(values | {_DIGEST_NAME: self.digest}, indent=2, sort_keys=True)

    def _values(self) -> dict[str, object]:
        # Without what older manifests lack, if it says nothing: so their digests stay the same.
        named: Any = fields(self)  # type: ignore[arg-type]
        silent = {field.name for field in named if getattr(self, field.name) == field.default}
        values: dict[str, object] = asdict(self)  # type: ignore[call-overload]
        return {name: value for name, value in values.items() if name not in silent}

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The manifest of a checkpoint's folder; raises `CorruptCheckpoint` where it cannot be understood."""
        path = directory / MANIFEST_NAME
        if path.exists() and not path.is_file():
            raise CorruptCheckpoint(f"{path} is not a file.")
        try:
            with path.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise ValueError(f"it is larger than {_MOST_BYTES >> 20} MiB")
            return cls.from_json(content.decode())
        except OSError as error:
            raise CorruptCheckpoint(f"{path} cannot be read: {error.strerror}.") from error
        except KeyError as error:
            raise CorruptCheckpoint(f"{path} cannot be understood: it has no {error.args[0]}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = excerpt(error, _REASON)
            raise CorruptCheckpoint(f"{path} cannot be understood: {reason}.") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """From what `manifest.json` holds; unknown names are left out, so that a newer writer can add some.

        Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` for anything else.
        """
        values = json.loads(text)
        if values.pop(_DIGEST_NAME) != _digest(values):
            raise ValueError("it was changed after it was written")
        if not 0 <= values["created_at"] < _LATEST_S:
            raise ValueError(f"created_at is {shown(values['created_at'], 40)}")
        for name, value in values.items():
            _require_bounded(name, value)
        values["files"] = [FileRecord(**typed(FileRecord, record)) for record in values["files"]]
        manifest = cls(**typed(cls, values))
        if not RUN_NAME.fullmatch(manifest.run):
            raise ValueError(f"run is {shown(manifest.run, 40)}")
        for record in manifest.files:
            if record.name in ("", ".", "..") or "\0" in record.name or "/" in record.name:
                raise ValueError(f"{shown(record.name, 40)} is not the name of a file")
        return manifest


def _digest(values: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def typed(owner: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass from what JSON holds; raises `KeyError` or `TypeError` if one is missing or odd."""
    typed = {}
    for field in fields(owner):
        if field.name not in values and field.default is not MISSING:
            continue
        value, kind = values[field.name], get_origin(field.type) or field.type
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        # A float that was whole may stand as a whole number.
        kinds = get_args(field.type) if kind is UnionType else (kind, int if kind is float else kind)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {shown(value, 40)}")
        typed[field.name] = value
    return typed


def _require_bounded(name: str, value: object) -> None:
    """Raises `ValueError` on what no list or message should carry, however deep it stands."""
    match value:
        case str() if len(value) > _MOST_CHARACTERS:
            raise ValueError(f"{name} has {len(value)} characters")
        case int() | float() if not -_MOST_NUMBER <= value <= _MOST_NUMBER:
            raise ValueError(f"{name} is {shown(value, 40)}")
        case tuple() | list():
            for each in value:
                _require_bounded(name, each)
        case Mapping():
            for key, each in value.items():
                _require_bounded(name, key)
                _require_bounded(name, each)


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
    # What a person noted about the run.
    notes: str = ""
