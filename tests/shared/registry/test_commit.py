import errno
import fcntl
import os
from pathlib import Path

import pytest

from shared.registry.commit import make_folder, sync

FULL_FLUSH = 51


class Syncs:
    """Records the calls that sync, instead of making them."""

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


def test_macos_flushes_the_cache_of_the_drive(syncs: Syncs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(tmp_path)
    assert syncs.calls == ["fsync"]
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_FLUSH, raising=False)
    sync(tmp_path)
    assert syncs.calls == ["fsync", str(FULL_FLUSH)]


def test_a_disk_without_full_flush_is_synced_plainly(
    syncs: Syncs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_FLUSH, raising=False)
    syncs.errors = {str(FULL_FLUSH): errno.ENOTSUP}
    sync(tmp_path)
    assert syncs.calls == [str(FULL_FLUSH), "fsync"]
    syncs.errors = {str(FULL_FLUSH): errno.EIO}
    with pytest.raises(OSError, match="Input/output error"):
        sync(tmp_path)


def test_a_file_system_that_cannot_sync_folders_is_tolerated(syncs: Syncs, tmp_path: Path) -> None:
    syncs.errors = {"fsync": errno.EINVAL}
    sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_an_existing_folder_above_the_registry_is_not_synced(syncs: Syncs, tmp_path: Path) -> None:
    make_folder(tmp_path / "var" / "registry" / "versions", tmp_path / "var" / "registry")
    # The existing folder, var, and registry.
    assert len(syncs.calls) == 3
    make_folder(tmp_path / "var" / "registry" / "versions", tmp_path / "var" / "registry")
    assert len(syncs.calls) == 3 + 2
