"""Which registry a folder holds: an id that no other registry has, also after the folder has moved."""

import re
import secrets
from pathlib import Path

from shared.errors import FailedPrecondition, shown
from shared.registry.commit import locked, make_folder, replace_text, writing

_NAME = "id"


def registry_id(root: Path) -> str:
    """Returns the id in the registry's file `id`, which is made when it is first asked for, and the folder with it.

    Raises `FailedPrecondition` if the folder cannot be written or the file holds something else. A copy of a folder has
    the same id until its file is removed.
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
            f"{shown(path)} holds {shown(text, 40)}, but must hold 16 hexadecimal digits. Remove it, and the registry "
            "gets another id; jobs that were queued under the old one are not seen any more."
        )
    return text
