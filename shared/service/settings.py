"""Reads settings from the environment. An invalid value stops the process with an error that names the variable."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from shared.errors import InvalidArgument, shown
from shared.registry.bucket import SCHEMES
from shared.registry.decisions import BestBy
from shared.registry.disk_store import DiskStore
from shared.registry.object_store import ObjectStore
from shared.registry.registry import Registry
from shared.registry.store import Store
from shared.text import excerpt

Environment = Mapping[str, str]

REGISTRY_CACHE_BYTES = 20 << 30
MAX_REGISTRY_CACHE_BYTES = 2**60

_BYTES = re.compile(r"([0-9]{1,19})([KMGTkmgt]?)")
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

Default = TypeVar("Default", int, None)
Number = TypeVar("Number", int, float)
Choice = TypeVar("Choice", bound=StrEnum)


def read_int(environment: Environment, name: str, default: Default, *, minimum: int, maximum: int) -> int | Default:
    """Reads an integer; raises `InvalidArgument` if it is not in [minimum, maximum]."""
    text = read_str(environment, name, "")
    return _number(int, "a whole number", name, text, minimum, maximum) if text else default


def read_float(environment: Environment, name: str, default: float, *, minimum: float, maximum: float) -> float:
    """Reads a number; raises `InvalidArgument` if it is not in [minimum, maximum]."""
    text = read_str(environment, name, "")
    return _number(float, "a number", name, text, minimum, maximum) if text else default


def _number(kind: type[Number], noun: str, name: str, text: str, minimum: float, maximum: float) -> Number:
    try:
        if not text.isascii():
            raise ValueError  # Python accepts the digits of every script
        value = kind(text)
    except ValueError:
        raise InvalidArgument(f"{name} is {shown(text)}, but must be {noun} from {minimum} to {maximum}.") from None
    if not minimum <= value <= maximum:
        raise InvalidArgument(f"{name} is {excerpt(text)}, but must be from {minimum} to {maximum}.")
    return value


def read_bytes(environment: Environment, name: str, default: int, *, maximum: int) -> int:
    """Reads a number of bytes, such as 500M, 10G or 1073741824; K, M, G and T are powers of 1024."""
    text = read_str(environment, name, "")
    if not text:
        return default
    value = parse_bytes(text)
    if value is None or value > maximum:
        raise InvalidArgument(f"{name} is {shown(text)}, but must be a number of bytes, such as 500M or 10G.")
    return value


def parse_bytes(text: str) -> int | None:
    """Returns the number of bytes that `read_bytes` reads in a text; None if the text has another form."""
    match = _BYTES.fullmatch(text)
    return int(match[1]) << _SHIFT[match[2].upper()] if match else None


def read_str(environment: Environment, name: str, default: str) -> str:
    """Reads a text; returns the default if the variable is unset or empty."""
    return environment.get(name, "").strip() or default


def read_choice(environment: Environment, name: str, choices: type[Choice]) -> Choice:
    """Reads one of several words, the first by default; raises `InvalidArgument` for any other."""
    text = read_str(environment, name, "")
    default, *_ = choices
    if not text:
        return default
    try:
        return choices(text)
    except ValueError:
        *others, last = (each.value for each in choices)
        raise InvalidArgument(f"{name} is {shown(text)}, but must be {', '.join(others)} or {last}.") from None


def read_port(environment: Environment, name: str, default: int) -> int:
    """Reads a TCP port; 0 lets the system choose a free one."""
    return read_int(environment, name, default, minimum=0, maximum=65535)


def read_best_by(environment: Environment) -> BestBy:
    """Reads what the label `best` compares; raises `InvalidArgument` if it is neither of the two."""
    return read_choice(environment, "GPTLOOP_BEST_BY", BestBy)


def to_address(host: str, port: int) -> str:
    """Joins a host and a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable_address(host: str, port: int) -> str:
    """Returns where a server that listens on `host` answers on this machine."""
    # One that listens on every address also answers on the loopback address.
    return to_address({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)


@dataclass(frozen=True)
class Directories:
    """The folders of all state, below one folder, `GPTLOOP_VAR` (default `var`)."""

    var: Path
    # Where the registry is, if `GPTLOOP_REGISTRY` names another place: the URL of object storage, or a folder.
    registry_url: str = ""
    registry_folder: Path | None = None
    registry_cache_bytes: int = REGISTRY_CACHE_BYTES

    @property
    def registry(self) -> Path:
        """States and versions, unless they are in object storage."""
        return self.registry_folder or self.var / "registry"

    @property
    def registry_cache(self) -> Path:
        """Copies of states and versions that are in object storage."""
        return self.cache / "registry"

    def open_registry(self, best_by: BestBy = BestBy.TRAINING) -> Registry:
        """Returns the registry, which need not exist yet.

        Raises `InvalidArgument` if object storage does not take its URL, and `FailedPrecondition` if what reaches it is
        not installed.
        """
        if self.registry_url:
            store: Store = ObjectStore(self.registry_url, self.registry_cache, self.registry_cache_bytes)
        else:
            store = DiskStore(self.registry)
        return Registry(store, best_by)

    @property
    def data(self) -> Path:
        """Tokenizers and token shards of prepared data sets."""
        return self.var / "data"

    @property
    def redis(self) -> Path:
        """Socket and append-only file of the embedded Redis."""
        return self.var / "redis"

    @property
    def log(self) -> Path:
        """One log file for each process."""
        return self.var / "log"

    @property
    def reports(self) -> Path:
        """Reports of evaluations."""
        return self.var / "reports"

    @property
    def cache(self) -> Path:
        """Files that can be built again: compiled libraries and kernels."""
        return self.var / "cache"

    @property
    def chat_history(self) -> Path:
        """A file with the lines that were typed in `gptloop chat`."""
        return self.var / "chat_history"


def read_directories(environment: Environment) -> Directories:
    """Returns the folders below `GPTLOOP_VAR` as absolute paths, without creating them.

    Raises `InvalidArgument` if the path is not a folder, or not valid UTF-8, which MLX needs.
    """
    var = Path(read_str(environment, "GPTLOOP_VAR", "var")).absolute()
    finding = f"GPTLOOP_VAR is {shown(str(var), 150)}"
    try:
        str(var).encode()
        is_other = var.exists() and not var.is_dir()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{finding}, but must be valid UTF-8, which MLX needs.") from None
    except OSError as error:
        raise InvalidArgument(f"{finding}, which is not a possible path: {error.strerror}.") from None
    if is_other:
        raise InvalidArgument(f"{finding}, but must be a folder, or the name of a new one.")
    cache_bytes = read_bytes(
        environment, "GPTLOOP_REGISTRY_CACHE_BYTES", REGISTRY_CACHE_BYTES, maximum=MAX_REGISTRY_CACHE_BYTES
    )
    return Directories(var, *_registry_place(environment), cache_bytes)


def _registry_place(environment: Environment) -> tuple[str, Path | None]:
    """Returns the URL of a registry in object storage, or the folder of one elsewhere, as `GPTLOOP_REGISTRY` says."""
    text = read_str(environment, "GPTLOOP_REGISTRY", "")
    scheme, mark, rest = text.partition("://")
    if mark and scheme in SCHEMES and rest.strip("/"):
        return text, None
    path = Path(unquote(rest)) if scheme == "file" and mark else Path(text)
    if (mark and scheme != "file") or (scheme == "file" and mark and not path.is_absolute()):
        right = ", ".join(f"{each}://BUCKET/PREFIX" for each in SCHEMES)
        raise InvalidArgument(f"GPTLOOP_REGISTRY is {shown(text)}, but must be a folder, file:///FOLDER, or {right}.")
    return "", path.absolute() if text else None
