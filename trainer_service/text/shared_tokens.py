"""Prepared tokens that machines share through object storage, each file put there once.

prepared/<key>/<name>          the SHA-256 and the size of a file, created by the machine that was first
prepared-files/<key>/<SHA-256> its content
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from shared.atomic_file import replacing
from shared.errors import StoreFailed
from shared.registry.bucket import Bucket, Conflict
from trainer_service.text.token_cache import UNUSED_S

logger = logging.getLogger(__name__)

_NAMES, _FILES = "prepared", "prepared-files"
_CHUNK_BYTES = 1 << 20


class SharedTokens:
    """The shared files of a bucket. A bucket that fails costs time, not the job: a machine then prepares for itself."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def names(self, key: str) -> list[str]:
        """Returns the names of the files of a key; none if the bucket fails."""
        try:
            return [each.name.rpartition("/")[2] for each in self._bucket.list(f"{_NAMES}/{key}")]
        except StoreFailed as error:
            logger.warning("Prepared tokens are not looked for: %s", error)
            return []

    def fetch(self, key: str, name: str, path: Path, on_part: Callable[[], None] = lambda: None) -> bool:
        """Writes a shared file to a local path, whole or not at all, and returns whether it did.

        A file whose SHA-256 is not the one that was noted is not used. `on_part` is called several times; an exception
        from it ends the work. Raises `OSError` if the path cannot be written.
        """
        try:
            digest, size_bytes = self._noted(key, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                found = hashlib.sha256()
                for part in self._bucket.parts(f"{_FILES}/{key}/{digest}", size_bytes):
                    on_part()
                    found.update(part)
                    file.write(part)
                if found.hexdigest() != digest:
                    raise _Unusable(f"{name} has changed: its SHA-256 is not the one that was noted")
            return True
        except FileNotFoundError:
            return False
        except (StoreFailed, _Unusable) as error:
            logger.warning("Prepared tokens are not taken from %s: %s", self._bucket.address, error)
            return False

    def offer(self, key: str, name: str, path: Path) -> None:
        """Shares a local file, or replaces it by the one that another machine has shared before under this name."""
        try:
            before = path.stat()
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    digest.update(chunk)
            noted = {"sha256": digest.hexdigest(), "size_bytes": before.st_size}
            self._bucket.upload(f"{_FILES}/{key}/{digest.hexdigest()}", path)
            if not os.path.samestat(path.stat(), before):
                return  # another process has put more tokens in its place
            try:
                self._bucket.create(f"{_NAMES}/{key}/{name}", json.dumps(noted).encode())
            except Conflict:
                self.fetch(key, name, path)
            self._remove_old()
        except StoreFailed as error:
            logger.warning("Prepared tokens are not shared: %s", error)

    def _noted(self, key: str, name: str) -> tuple[str, int]:
        content, _ = self._bucket.read(f"{_NAMES}/{key}/{name}")
        try:
            values = json.loads(content)
            digest, size_bytes = values["sha256"], values["size_bytes"]
            if not (isinstance(digest, str) and len(digest) == 64 and digest.isalnum() and size_bytes >= 0):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise _Unusable(f"what is noted of {name} cannot be understood") from None
        return digest, int(size_bytes)

    def _remove_old(self) -> None:
        """Removes what was put there a month ago; a machine that needs it then puts it there again."""
        now = time.time()
        for prefix in (_NAMES, _FILES):
            self._bucket.delete(each.name for each in self._bucket.list(prefix) if now - each.written_at > UNUSED_S)


class _Unusable(Exception):
    """A shared file is not what it should be."""
