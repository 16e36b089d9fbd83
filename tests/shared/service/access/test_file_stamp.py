"""A stamp changes with its file, however the file is changed."""

import os
from pathlib import Path

from shared.service.access.file_stamp import stamp_of
from tests.waiting import wait_until


def test_a_stamp_stays_while_nothing_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    assert stamp_of(path) == stamp_of(path) is not None
    assert stamp_of(tmp_path / "absent") is None


def test_a_replaced_file_has_another_stamp_although_size_and_time_are_the_same(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for each in (path, other):
        each.write_text("one")
        os.utime(each, (1, 1))
    before = stamp_of(path)
    other.replace(path)
    assert stamp_of(path) != before


def test_a_link_to_another_file_changes_the_stamp(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text("same")
    link = tmp_path / "link"
    link.symlink_to("one")
    before = stamp_of(link)
    link.unlink()
    link.symlink_to("two")
    assert stamp_of(link) != before


def test_a_change_of_rights_changes_the_stamp(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    path.chmod(0o400)
    os.utime(path, (1, 1))
    before = stamp_of(path)

    def is_noticed() -> bool:
        path.chmod(0o600)
        return stamp_of(path) != before

    # Times of a file system may stand still for some milliseconds.
    wait_until(is_noticed)
