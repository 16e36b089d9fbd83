"""What a job finds on one machine only: text files, and the folder with the ledgers of a large teacher.

Workers may run on other machines than the one on which a job was queued.
"""

import secrets
import socket
from collections.abc import Sequence
from pathlib import Path

from shared.errors import DataError, FailedPrecondition, NotFound, shown
from shared.registry.commit import locked, replace_text
from trainer_service.text.corpus import DatasetSpec, is_named
from trainer_service.text.file_bytes import identify

# Below the folder of data; no set of stories has a name that begins with a dot.
_PLACE = Path("stories/.place")


def files_of(data: DatasetSpec, pairs: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the text files that a job reads."""
    return (*(name for name in data.dataset if not is_named(name)), *data.validation, *pairs)


def sizes_bytes(files: Sequence[str]) -> tuple[int, ...]:
    """Returns the size of each file; raises `NotFound`, `InvalidArgument` or `DataError` if it cannot be read."""
    return tuple(identify(Path(name)).size_bytes for name in files)


def require_same(files: Sequence[str], sizes: Sequence[int]) -> None:
    """Raises `NotFound` or `DataError` if this machine has not the files that a job was queued with, by their sizes.

    What it reads is compared by its hash when a run resumes.
    """
    here = f"on {socket.gethostname()}, whose worker took the job"
    for name, size_bytes in zip(files, sizes, strict=False):
        try:
            found = Path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(
                f"The file {shown(name)} does not exist {here}: the machines of all workers need it under this path."
            ) from None
        except OSError as error:
            raise DataError(f"The file {shown(name)} cannot be read {here}: {error.strerror}.") from None
        if found != size_bytes:
            raise DataError(
                f"The file {shown(name)} has {found:,} bytes {here}, but had {size_bytes:,} when the job was queued: "
                "it has changed, or this machine has another file of this name."
            )


def place_of(data: Path) -> str:
    """Returns the id of a folder of data, which it gets at the first call and keeps in backups.

    What a large teacher was paid for is in such a folder, and its limits hold for what is there. Raises
    `FailedPrecondition` if the folder cannot be written.
    """
    path = data / _PLACE
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(f"{path.name}.lock")):
                if not path.exists():
                    replace_text(path, secrets.token_hex(4))
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise FailedPrecondition(f"The folder {shown(str(path.parent))} cannot be written: {error.strerror}.") from None
