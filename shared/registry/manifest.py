"""The description of a checkpoint: one `manifest.json` in every state and every version."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin

from shared.errors import CorruptCheckpoint, FailedPrecondition, NewerFormat, UnreadableCheckpoint, shown
from shared.registry.numbering import is_not_regular
from shared.text import excerpt

MANIFEST_NAME = "manifest.json"
# The format of a checkpoint, its manifest and its files. A change that earlier code would misread raises it; names that
# earlier code can ignore do not. A manifest without a format has the first one.
FORMAT = 1
_FORMAT_NAME = "format"
# The preset of an imported version, and of versions that continue one.
IMPORTED = "imported"
# The name of a run is also the name of its folder.
RUN_NAME = re.compile(r"\w[\w.-]{0,199}")
# Lists and messages carry the values of a manifest: texts have at most the length of a path, numbers 64 bits. The whole
# manifest may be large, because it names every text file that the version was trained on.
MAX_BYTES = 64 << 20
_MAX_CHARACTERS = 4096
_MAX_NUMBER = 2**63 - 1
# The most characters of the reason in an error about an invalid manifest.
_REASON = 120
# The end of the year 9999, in seconds since the epoch.
LATEST_S = 253402300800
# The SHA-256 of all other values of a manifest.
_DIGEST_NAME = "sha256"


def manifest_of(directory: Path) -> bytes:
    """Returns the content of `manifest.json` in a folder, or the beginning of one that is larger than `MAX_BYTES`."""
    path = directory / MANIFEST_NAME
    # To read a pipe could take for ever.
    if is_not_regular(path):
        raise CorruptCheckpoint(f"{path} is not a file.")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class TeacherRecord:
    """A version that taught a run: its number, and the digest of its manifest."""

    version: int
    digest: str


class _Manifest:
    """What both kinds of manifests have in common."""

    run: str
    files: tuple[FileRecord, ...]

    @property
    def size_bytes(self) -> int:
        """The size of all files except the manifest."""
        return sum(record.size_bytes for record in self.files)

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of all values, including the hashes of the files, in hexadecimal."""
        return _digest(self._values())

    def to_json(self) -> str:
        """Returns the text of `manifest.json`."""
        values = self._values()
        return json.dumps(values | {_DIGEST_NAME: self.digest}, indent=2, sort_keys=True)

    def _values(self) -> dict[str, object]:
        # Omits fields with their default value, so that the digest of an older manifest stays the same.
        named: Any = fields(self)  # type: ignore[arg-type]
        silent = {field.name for field in named if getattr(self, field.name) == field.default}
        values: dict[str, object] = asdict(self)  # type: ignore[call-overload]
        return ({_FORMAT_NAME: FORMAT} if FORMAT > 1 else {}) | {
            name: value for name, value in values.items() if name not in silent
        }

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Reads the manifest in a checkpoint's folder; raises as `load` does."""
        return cls.load(lambda: manifest_of(directory), str(directory / MANIFEST_NAME))

    @classmethod
    def load(cls, read: Callable[[], bytes], place: str) -> Self:
        """Returns the manifest that `read` reads; errors name its place.

        Raises `UnreadableCheckpoint`, `CorruptCheckpoint` if it is invalid, and `NewerFormat` if its format is newer.
        """
        try:
            content = read()
            if len(content) > MAX_BYTES:
                raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
            return cls.from_json(content.decode())
        except NewerFormat as error:
            raise NewerFormat(f"{place} was written by a newer gptloop: {error}. Upgrade this one.") from None
        except FailedPrecondition:
            raise  # the whole store cannot be read
        except OSError as error:
            raise UnreadableCheckpoint(f"{place} cannot be read: {error.strerror}.") from error
        except KeyError as error:
            raise CorruptCheckpoint(f"{place} cannot be understood: it has no {error.args[0]}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = excerpt(error, _REASON)
            raise CorruptCheckpoint(f"{place} cannot be understood: {reason}.") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Parses the text of `manifest.json`; ignores unknown names, so that newer writers can add some.

        Raises `ValueError`, `TypeError`, `KeyError` or `AttributeError` if it is invalid, and `NewerFormat`.
        """
        values = json.loads(text)
        known = values.get(_FORMAT_NAME, 1)
        if isinstance(known, int) and known > FORMAT:
            raise NewerFormat(f"its format is {shown(known, 20)}, and this one reads formats up to {FORMAT}")
        if values.pop(_DIGEST_NAME) != _digest(values):
            raise ValueError("it was changed after it was written")
        if not 0 <= values["created_at"] < LATEST_S:
            raise ValueError(f"created_at is {shown(values['created_at'], 40)}")
        for name, value in values.items():
            _require_bounded(name, value)
        values["files"] = [FileRecord(**typed(FileRecord, record)) for record in values["files"]]
        if "teachers" in values:
            values["teachers"] = [TeacherRecord(**typed(TeacherRecord, record)) for record in values["teachers"]]
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
    """Returns the fields of a dataclass from JSON; raises `KeyError` or `TypeError` if one is missing or invalid."""
    typed = {}
    for field in fields(owner):
        if field.name not in values and (field.default, field.default_factory) != (MISSING, MISSING):
            continue
        value, kind = values[field.name], get_origin(field.type) or field.type
        if kind is tuple and isinstance(value, list):
            value = tuple(value)
        # JSON may contain a whole number in the place of a float.
        kinds = get_args(field.type) if kind is UnionType else (kind, int if kind is float else kind)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise TypeError(f"{field.name} is {shown(value, 40)}")
        typed[field.name] = value
    return typed


def _require_bounded(name: str, value: object) -> None:
    """Raises `ValueError` if a value, or a value inside it, is too long or too large."""
    match value:
        case str() if len(value) > _MAX_CHARACTERS:
            raise ValueError(f"{name} has {len(value)} characters")
        case int() | float() if not -_MAX_NUMBER <= value <= _MAX_NUMBER:
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
    """The manifest of a state: everything that a run needs to continue from a step."""

    run: str
    step: int
    created_at: float
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class VersionManifest(_Manifest):
    """The manifest of a version: everything that a server needs to serve it, and how good it claims to be.

    Losses are in nats per token, and comparable only between versions with the same `evaluation_set`. `claimed_loss` is
    the loss on the windows in `evaluation.npy`. Times are in seconds since the epoch.
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
    # Notes of a person about the run.
    notes: str = ""
    # The versions whose predictions the run learned.
    teachers: tuple[TeacherRecord, ...] = ()
