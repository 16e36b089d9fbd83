from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from tests.registries import registry_id


def test_a_registry_keeps_its_unique_id(tmp_path: Path) -> None:
    first = registry_id(tmp_path / "first" / "registry")
    assert registry_id(tmp_path / "first" / "registry") == first != registry_id(tmp_path / "second")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert registry_id(tmp_path / "moved" / "registry") == first


def test_concurrent_first_calls_get_the_same_id(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(registry_id, [tmp_path / "registry"] * 32))) == 1


@pytest.mark.parametrize("text", ["", "no id", "00" * 9, "\x00\xff"])
def test_a_damaged_id_is_an_error_with_advice(tmp_path: Path, text: str) -> None:
    (tmp_path / "id").write_text(text, encoding="latin-1")
    with pytest.raises(FailedPrecondition, match="16 hexadecimal digits"):
        registry_id(tmp_path)


def test_a_registry_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "registry").write_text("a file")
    with pytest.raises(FailedPrecondition, match="registry is a file, and no folder; remove the file"):
        registry_id(tmp_path / "registry")
