"""Stores tokens on disk: a header of fixed size, then little-endian 16-bit numbers. A shard is whole or absent."""

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from shared.atomic_file import PARTIAL_SUFFIX, replacing
from trainer_service.training.batches import Tokens

MAGIC = "gptloop-tokens"
VERSION = 1
HEADER_BYTES = 4096
DTYPE = np.dtype("<u2")
# A partial file that has not changed for this long belongs to a process that was killed.
ABANDONED_S = 3600.0
_ALL = "all"


def read_shard(path: Path, limit: int | None) -> Tokens | None:
    """Returns the first `limit` tokens of a shard, memory-mapped, (N,); fewer only if the whole split has fewer.

    Without a limit it returns the whole split.

    Returns None if the shard does not exist, holds too few tokens, or has another size than its header says.
    """
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(HEADER_BYTES))
            size_bytes = os.fstat(file.fileno()).st_size
            count, complete = values["count"], values["complete"]
            if values["magic"] != MAGIC or values["version"] != VERSION:
                return None
            enough = complete or (limit is not None and count >= limit)
            if size_bytes != HEADER_BYTES + count * DTYPE.itemsize or not enough:
                return None
            if count == 0:
                return np.zeros(0, dtype=DTYPE)  # an empty range cannot be mapped
            return np.memmap(file, dtype=DTYPE, mode="r", offset=HEADER_BYTES, shape=(count,))[:limit]  # (N,)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_shard(path: Path, origin: Mapping[str, str], arrays: Iterable[Tokens], limit: int | None) -> None:
    """Writes the first `limit` tokens of a split, or all of them, atomically.

    The header holds their `origin`, their `count`, and whether they are the `complete` split. Raises `OSError` if the
    disk cannot be written, and leaves no partial file then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for partial in path.parent.glob(f"*{PARTIAL_SUFFIX}"):
        if time.time() - partial.stat().st_mtime > ABANDONED_S:
            partial.unlink(missing_ok=True)
    count = 0
    with replacing(path) as file:
        file.seek(HEADER_BYTES)
        for array in arrays:
            part = array if limit is None else array[: limit - count]
            file.write(part.astype(DTYPE, copy=False).tobytes())
            count += part.size
            if count == limit:
                break
        header = {"magic": MAGIC, "version": VERSION, **origin, "split": path.stem}
        content = json.dumps(header | {"count": count, "complete": limit is None or count < limit}).encode()
        assert len(content) <= HEADER_BYTES
        file.seek(0)
        file.write(content.ljust(HEADER_BYTES))


def portable_name(path: Path) -> str:
    """Returns a name for a shard that says what `sufficient` needs to know of it."""
    with path.open("rb") as file:
        values = json.loads(file.read(HEADER_BYTES))
    return f"{path.stem}-{VERSION}-{_ALL if values['complete'] else values['count']}"


def sufficient(names: Iterable[str], split: str, limit: int | None) -> str | None:
    """Returns the smallest of some shards that has the first `limit` tokens of a split, or all; None if none has."""
    prefix = f"{split}-{VERSION}-"
    counts = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    enough = [int(count) for count in counts if count.isdecimal() and limit is not None and int(count) >= limit]
    if enough:
        return f"{prefix}{min(enough)}"
    return f"{prefix}{_ALL}" if _ALL in counts else None
