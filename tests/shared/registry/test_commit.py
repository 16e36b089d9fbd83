import errno
import fcntl
import os
from pathlib import Path

import pytest

from shared.registry.commit import make_folder, sync

FULL_FLUSH = 51


class Syncs:
    """What was asked of the disk, in place of asking it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.errors: dict[str, int] = {}
        monkeypatch.setattr(os, "fsync", lambda _: self._call("fsync"))
        monkeypatch.setattr(fcntl, "fcntl", lambda _descriptor, command: self._call(str(command)))

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.errors:
            raise OSError(self.errors[name], os.strerror(self.errors[name]))


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Syncs:
    monkeypatch.delattr(fcntl, "F_FULLFSYNC", raising=False)
    return Syncs(monkeypatch)


def test_macos_flushes_the_drives_cache_too(syncs: Syncs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(tmp_path)
    assert syncs.calls == ["fsync"]
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_FLUSH, raising=False)
    sync(tmp_path)
    assert syncs.calls == ["fsync", str(FULL_FLUSH)]


def test_a_disk_without_a_full_flush_gets_a_plain_one(
    syncs: Syncs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_FLUSH, raising=False)
    syncs.errors = {str(FULL_FLUSH): errno.ENOTSUP}
    sync(tmp_path)
    assert syncs.calls == [str(FULL_FLUSH), "fsync"]
    syncs.errors = {str(FULL_FLUSH): errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def test_a_file_system_that_cannot_sync_folders_is_borne_with(syncs: Syncs, tmp_path: Path) -> None:
    syncs.errors = {"fsync": errno.EINVAL}
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_a_folder_above_the_registry_is_left_alone_where_it_exists(syncs: Syncs, tmp_path: Path) -> None:
    make_folder(tmp_path / "var" / "registry" / "versions", tmp_path / "var" / "registry")
    # The folder that was there, var, and registry.
    assert len(syncs.calls) == 3
    make_folder(tmp_path / "var" / "registry" / "versions", tmp_path / "var" / "registry")
    assert len(syncs.calls) == 3 + 2
