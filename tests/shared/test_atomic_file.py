"""A file is replaced whole or stays as it was."""

import stat
from pathlib import Path

import pytest

from shared.atomic_file import replacing


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path, mode=0o755) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), replacing(path) as file:
        file.write(b"new")
        raise OSError("disk")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
