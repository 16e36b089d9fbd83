"""Objects in object storage: S3, Google Cloud Storage or Azure, by one library; nothing else imports it."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from shared.errors import FailedPrecondition, InvalidArgument, StoreFailed, shown
from shared.text import excerpt

Result = TypeVar("Result")

SCHEMES = ("s3", "gs", "az")
_MISSING = "obstore is not installed, which reaches object storage: make .venv/object-storage"
_RIGHT = "a folder, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
# A request and its repetitions by the library end within this time.
_RETRY_S = 10.0
_REQUEST_S = 20.0
_CONNECT_S = 5.0
# A large object is read in parts, so that none takes long.
_PART_BYTES = 8 << 20
# How often a conditional write is tried again whose outcome nobody knows.
_TRIES = 4
_PAUSE_S = 0.2
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")


class Conflict(Exception):
    """An object is not what a conditional write expects."""


@dataclass(frozen=True)
class Entry:
    """An object: its name, a value that changes with its content, its size, and its time in seconds since the epoch."""

    name: str
    e_tag: str
    size_bytes: int
    written_at: float


class Bucket:
    """The objects below the prefix of a URL.

    Raises `InvalidArgument` if the URL is none, and `FailedPrecondition` if the library is missing. Methods raise
    `StoreFailed` if the storage fails longer than some seconds, and `FileNotFoundError` for an object that is absent.
    """

    def __init__(self, url: str) -> None:
        try:
            import obstore
            import obstore.store
        except ModuleNotFoundError:
            raise FailedPrecondition(f"GPTLOOP_REGISTRY is {shown(url)}, but {_MISSING}.") from None
        self.address = url
        try:
            parts = urlsplit(url)
        except ValueError:
            raise InvalidArgument(f"GPTLOOP_REGISTRY is {shown(url)}, but must be {_RIGHT}.") from None
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise InvalidArgument(f"GPTLOOP_REGISTRY is {shown(url)}, but must be {_RIGHT}.")
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        allows_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("true", "1")
        if parts.scheme == "s3" and endpoint.startswith("http://") and not allows_http:
            raise InvalidArgument(
                f"AWS_ENDPOINT_URL is {shown(endpoint)}, which encrypts nothing; AWS_ALLOW_HTTP=true allows it."
            )
        self._obstore = obstore
        self._bucket = parts.netloc
        # The e_tag and the version of an object when it was last read: a replacement at Google names the version.
        self._versions: dict[str, tuple[str, str]] = {}
        try:
            self._store = obstore.store.from_url(
                url,
                client_options={
                    # Options replace what the library reads from the environment.
                    "allow_http": allows_http,
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    "timeout": timedelta(seconds=_REQUEST_S),
                },
                retry_config={
                    "max_retries": 6,
                    "retry_timeout": timedelta(seconds=_RETRY_S),
                    "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=2), "base": 2},
                },
            )
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise InvalidArgument(
                f"GPTLOOP_REGISTRY is {shown(url)}, which cannot be used: {_reason(error)}."
            ) from None

    def read(self, name: str) -> tuple[bytes, str]:
        """Returns the content and the e_tag of an object."""

        def read() -> tuple[bytes, str]:
            found = self._obstore.get(self._store, name)
            content, e_tag, version = bytes(found.bytes()), found.meta["e_tag"] or "", found.meta["version"]
            if version is not None and self.address.startswith("gs:"):
                self._versions[name] = (e_tag, version)
            return content, e_tag

        return self._asked("read", name, read)

    def parts(self, name: str, size_bytes: int) -> Iterator[bytes]:
        """Yields the content of an object of a known size in parts."""
        for start in range(0, size_bytes, _PART_BYTES):
            end = min(start + _PART_BYTES, size_bytes)
            yield self._asked("read", name, partial(self._part, name, start, end))

    def _part(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._obstore.get_range(self._store, name, start=start, end=end))

    def list(self, prefix: str) -> list[Entry]:
        """Returns the objects whose names begin with a folder's name, in alphabetical order."""

        def collect() -> list[Entry]:
            found = self._obstore.list(self._store, prefix, chunk_size=1000)
            return [
                Entry(each["path"], each["e_tag"] or "", each["size"], each["last_modified"].timestamp())
                for chunk in found
                for each in chunk
            ]

        try:
            return sorted(self._asked("list", prefix, collect), key=lambda each: each.name)
        except FileNotFoundError:
            return []

    def upload(self, name: str, content: Path | bytes) -> None:
        """Writes an object, whatever is there."""
        self._repeated(name, lambda: self._obstore.put(self._store, name, content, max_concurrency=4))

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects that need not exist."""
        for name in names:
            try:
                self._repeated(name, partial(self._obstore.delete, self._store, name))
            except FileNotFoundError:
                continue

    def create(self, name: str, content: bytes) -> None:
        """Writes an object that must not exist; raises `Conflict` if it does. The content must be unlike any other."""
        self._write(name, content, None)

    def replace(self, name: str, content: bytes, e_tag: str) -> None:
        """Writes an object that must still have an e_tag; raises `Conflict` if it has not. The content as in `create`.

        An empty content may be like another: what it replaces does not come back.
        """
        self._write(name, content, e_tag)

    def _write(self, name: str, content: bytes, e_tag: str | None) -> None:
        errors = self._obstore.exceptions
        read_tag, version = self._versions.get(name, ("", ""))
        expected: Any = {"e_tag": e_tag} | ({"version": version} if read_tag and read_tag == e_tag else {})
        for left in reversed(range(_TRIES)):
            try:
                self._obstore.put(self._store, name, content, mode="create" if e_tag is None else expected)
                return
            except (errors.BaseError, FileNotFoundError) as error:
                failure: Exception = error
            is_conflict = isinstance(failure, (errors.AlreadyExistsError, errors.PreconditionError))
            if not is_conflict and not _may_pass(failure):
                raise self._failed("write", failure) from failure
            # The write may have taken place all the same, before an answer was lost and the library repeated it.
            try:
                now, now_tag = self.read(name)
            except FileNotFoundError:
                now, now_tag = None, None
            if now == content:
                return
            if now_tag != e_tag:
                raise Conflict(name)
            if left == 0:
                raise self._failed("write", failure) from failure
            time.sleep(_PAUSE_S)
        raise AssertionError

    def _repeated(self, name: str, ask: Callable[[], object]) -> None:
        """Asks for a write that may take place twice, which the library does not repeat after a lost connection."""
        begin = time.monotonic()
        while True:
            try:
                self._asked("write", name, ask)
                return
            except StoreFailed as error:
                cause, over = error.__cause__, time.monotonic() - begin >= _RETRY_S
                if over or not isinstance(cause, Exception) or not _may_pass(cause):
                    raise
            time.sleep(_PAUSE_S)

    def _asked(self, act: str, name: str, ask: Callable[[], Result]) -> Result:
        try:
            return ask()
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise self._failed(act, error) from None
            raise FileNotFoundError(2, "No such object", f"{self.address}/{name}") from None
        except self._obstore.exceptions.BaseError as error:
            raise self._failed(act, error) from error

    def _failed(self, act: str, error: Exception) -> StoreFailed:
        status, code = _status(error), _code(error)
        if code == "NoSuchBucket":
            advice = f"there is no bucket {self._bucket}; create it, or name another one in GPTLOOP_REGISTRY"
        elif status in (401, 403) or isinstance(
            error, (self._obstore.exceptions.PermissionDeniedError, self._obstore.exceptions.UnauthenticatedError)
        ):
            advice = (
                f"it refuses the keys ({code or status}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and its policy"
            )
        elif status is not None:
            advice = f"it answers with status {status}{f' ({code})' if code else ''}; try again, or look at its log"
        else:
            endpoint = os.environ.get("AWS_ENDPOINT_URL")
            place = f" at {endpoint}" if endpoint else ""
            advice = f"it does not answer{place} ({_reason(error)}); check that it runs, and AWS_ENDPOINT_URL"
        verb = "written" if act == "write" else "read"
        return StoreFailed(f"The registry {self.address} cannot be {verb}: {advice}.")


def _may_pass(error: Exception) -> bool:
    """Returns whether the outcome of a write is unknown, or the same write may succeed later."""
    status = _status(error)
    return status is None or status in (408, 409, 429) or status >= 500


def _status(error: Exception) -> int | None:
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _code(error: Exception) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def _reason(error: Exception) -> str:
    """Returns the first line of an error of the library, without the request."""
    line = str(error).partition("\n")[0]
    return excerpt(line.rpartition(" - ")[2] or line, 120).removesuffix(".")
