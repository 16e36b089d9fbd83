"""The unique id of a registry, which it keeps when its folder moves."""

import re
import secrets
from pathlib import Path

from shared.errors import FailedPrecondition, shown
from shared.registry.commit import locked, make_folder, replace_text, writing

_NAME = "id"


def registry_id(root: Path) -> str:
    """Returns the id in the registry's file `id`; creates the file, and the folder, if they do not exist.

    A copy of a folder has the same id until its file is removed. Raises `FailedPrecondition` if the folder cannot be
    written, or if the file is invalid.
    """
    path = root / _NAME
    with writing(root):
        if not path.exists():
            make_folder(root, root)
            with locked(root / f"{_NAME}.lock"):
                if not path.exists():
                    replace_text(path, secrets.token_hex(8))
        text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch("[0-9a-f]{16}", text):
        raise FailedPrecondition(
            f"{shown(path)} contains {shown(text, 40)}, but must contain 16 hexadecimal digits. If you remove it, the "
            "registry gets a new id, and no longer sees the jobs that were queued under the old one."
        )
    return text
