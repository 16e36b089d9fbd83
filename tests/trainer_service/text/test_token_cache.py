import os
from pathlib import Path

from trainer_service.text.token_cache import UNUSED_S, mark_used, remove_unused


def test_tokens_that_no_run_has_used_for_long_are_removed(tmp_path: Path) -> None:
    for name in ("old", "used", "new"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "train.bin").write_bytes(b"tokens")
        if name != "new":
            at_s = folder.stat().st_mtime - UNUSED_S - 100
            os.utime(folder, (at_s, at_s))
    mark_used(tmp_path / "used")
    mark_used(tmp_path / "absent")
    remove_unused(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "used"]
    remove_unused(tmp_path / "absent")
