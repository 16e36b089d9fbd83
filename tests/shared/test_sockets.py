import os
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from shared.sockets import make_socket_folder, short_socket_path


def test_a_short_path_is_kept() -> None:
    assert short_socket_path(Path("/var/x/redis.sock")) == Path("/var/x/redis.sock")


def test_a_long_path_becomes_a_short_one_of_its_own() -> None:
    first, second = (Path("/") / (letter * 120) / "redis.sock" for letter in "ab")
    short = short_socket_path(first)
    assert len(os.fsencode(short)) < 100
    assert short.name == "redis.sock"
    assert short == short_socket_path(first) != short_socket_path(second)


def test_the_folder_is_for_this_user_only(tmp_path: Path) -> None:
    socket = tmp_path / "folder" / "redis.sock"
    socket.parent.mkdir(mode=0o755)
    make_socket_folder(socket)
    assert socket.parent.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(FailedPrecondition, match="somebody else"):
        make_socket_folder(tmp_path / "link" / "redis.sock")
