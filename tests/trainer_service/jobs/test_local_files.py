import socket
import threading
from pathlib import Path

import pytest

from shared.errors import DataError, FailedPrecondition, NotFound
from trainer_service.jobs.local_files import place_of, require_same, sizes_bytes


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "other")


def test_a_machine_that_lacks_a_file_of_a_job_or_has_another_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tales.txt"
    path.write_text("twelve bytes")
    files = (str(path),)
    sizes = sizes_bytes(files)
    require_same(files, sizes)
    path.write_text("other text")
    with pytest.raises(
        DataError, match=r"tales.txt' has 10 bytes on other, whose worker took the job, but had 12 when"
    ):
        require_same(files, sizes)
    path.unlink()
    with pytest.raises(NotFound, match=r"tales.txt' does not exist on other, .* need it under this path"):
        require_same(files, sizes)
    with pytest.raises(DataError, match=r"cannot be read on other, .*: File name too long"):
        require_same(("x" * 300,), (1,))


def test_a_folder_of_data_gets_its_id_once(tmp_path: Path) -> None:
    found = set[str]()
    threads = [threading.Thread(target=lambda: found.add(place_of(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {place_of(tmp_path)}
    assert (tmp_path / "stories" / ".place").read_text() == place_of(tmp_path)


def test_a_folder_of_data_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "stories").touch()
    with pytest.raises(FailedPrecondition, match=r"stories' cannot be written: "):
        place_of(tmp_path)
