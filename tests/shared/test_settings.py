from pathlib import Path

import pytest

from shared.errors import InvalidArgument
from shared.settings import Directories, read_directories


def test_the_folder_of_state_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_directories({}) == Directories(tmp_path / "var")
    assert read_directories({"GPTLOOP_VAR": "sp ace ü"}) == Directories(tmp_path / "sp ace ü")


@pytest.mark.parametrize("name", ["a file", "not \udcff UTF-8", "long" * 2000])
def test_a_path_that_cannot_hold_state_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(InvalidArgument, match=r"^GPTLOOP_VAR is ") as raised:
        read_directories({"GPTLOOP_VAR": str(tmp_path / name)})
    assert len(str(raised.value)) <= 300
    assert str(raised.value).isprintable()
