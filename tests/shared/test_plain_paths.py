import fcntl
import os
from pathlib import Path

import pytest

from shared import plain_paths
from shared.errors import FailedPrecondition
from shared.plain_paths import plain_path, socket_folder

ODD = """sp ace %d " o'ne $HOME `x` ü 猫"""


@pytest.fixture(autouse=True)
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the links: below the test's own folder instead of /tmp."""
    place = tmp_path / "links"
    place.mkdir()
    monkeypatch.setattr(plain_paths, "_PLACE", place)
    return place / f"gptloop-{os.getuid()}"


def test_a_plain_path_is_kept(links: Path) -> None:
    assert plain_path(Path("/var/lib/gptloop-1.0/x_y")) == Path("/var/lib/gptloop-1.0/x_y")
    assert not links.exists()


def test_only_the_path_of_a_socket_must_be_short(links: Path) -> None:
    long = Path("/") / ("long" * 30)
    assert plain_path(long) == long
    assert socket_folder(long).parent == links
    assert socket_folder(Path("/short")) == Path("/short")
    assert socket_folder(Path("/a b")) == plain_path(Path("/a b"))


@pytest.mark.parametrize("name", [ODD, "a:b", "a b"])
def test_any_other_path_gets_a_link_to_the_same_folder(tmp_path: Path, links: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "file").write_text("here")
    plain = plain_path(folder)
    assert (plain / "file").read_text() == "here"
    assert plain.parent == links
    assert plain.name.isalnum()
    assert len(plain.name) == 16
    assert links.stat().st_mode & 0o777 == 0o700
    assert plain_path(folder) == plain


def test_two_folders_have_two_links() -> None:
    assert plain_path(Path("/a b")) != plain_path(Path("/a c"))


def test_the_link_is_created_once_the_folder_exists(tmp_path: Path, links: Path) -> None:
    folder = tmp_path / ODD
    before = plain_path(folder)
    assert not links.exists()
    folder.mkdir()
    assert plain_path(folder) == before
    assert before.is_dir()


def test_the_links_are_locked_while_a_process_uses_one(tmp_path: Path, links: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    plain_path(folder)
    descriptor = os.open(links, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_links_to_missing_folders_are_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "an old one", tmp_path / "a new one"
    old.mkdir()
    link = plain_path(old)
    old.rmdir()
    new.mkdir()
    plain_path(new)
    assert not link.is_symlink()


@pytest.mark.parametrize("with_folder", [True, False])
def test_links_that_another_user_can_write_to_are_rejected(tmp_path: Path, links: Path, with_folder: bool) -> None:
    folder = tmp_path / ODD
    if with_folder:
        folder.mkdir()
    links.mkdir()
    links.chmod(0o777)
    with pytest.raises(FailedPrecondition, match="only you can write"):
        plain_path(folder)
    links.rmdir()
    links.symlink_to(tmp_path)
    with pytest.raises(FailedPrecondition, match="only you can write"):
        plain_path(folder)
