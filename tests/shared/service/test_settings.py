from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument
from shared.service.settings import Directories, read_bytes, read_directories, read_float, read_int


def test_the_folder_of_all_state_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_directories({}) == Directories(tmp_path / "var")
    assert read_directories({"GPTLOOP_VAR": "sp ace ü"}) == Directories(tmp_path / "sp ace ü")


@pytest.mark.parametrize("name", ["a file", "not \udcff UTF-8", "long" * 2000])
def test_an_unusable_folder_is_rejected(tmp_path: Path, name: str) -> None:
    (tmp_path / "a file").touch()
    with pytest.raises(InvalidArgument, match=r"^GPTLOOP_VAR is ") as raised:
        read_directories({"GPTLOOP_VAR": str(tmp_path / name)})
    assert len(str(raised.value)) <= 300
    assert str(raised.value).isprintable()


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.floats().map(str)


@given(TEXTS | st.integers().map(str))
def test_any_text_in_a_variable_gives_a_value_in_its_range_or_a_short_error(text: str) -> None:
    def read(kind: str) -> float:
        if kind == "int":
            return read_int({"NAME": text}, "NAME", 5, minimum=1, maximum=9)
        if kind == "float":
            return read_float({"NAME": text}, "NAME", 5.0, minimum=1.0, maximum=9.0)
        return read_bytes({"NAME": text}, "NAME", 5, maximum=9)

    for kind in ("int", "float", "bytes"):
        try:
            assert 0 <= read(kind) <= 9
        except InvalidArgument as error:
            assert str(error).startswith("NAME is ") and len(str(error)) <= 300 and str(error).isprintable()


@pytest.mark.parametrize("text", ["٣", "3" * 5000, "nan", "1e1", "0x3"])
def test_a_text_that_is_not_a_whole_number_is_rejected(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"NAME is .*, but must be"):
        read_int({"NAME": text}, "NAME", 5, minimum=1, maximum=9)


@pytest.mark.parametrize("text", ["٣", "nan", "inf", "9" * 5000, "three"])
def test_a_text_that_is_not_a_number_in_the_range_is_rejected(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"NAME is .*, but must be"):
        read_float({"NAME": text}, "NAME", 5.0, minimum=1.0, maximum=9.0)


@pytest.mark.parametrize(
    ("text", "url", "folder"),
    [
        ("", "", None),
        ("/srv/registry", "", "/srv/registry"),
        ("file:///srv/a%20b", "", "/srv/a b"),
        ("s3://bucket/prefix", "s3://bucket/prefix", None),
        ("gs://bucket", "gs://bucket", None),
        ("az://container/a/b", "az://container/a/b", None),
    ],
)
def test_the_registry_is_in_a_folder_or_in_object_storage(text: str, url: str, folder: str | None) -> None:
    directories = read_directories({"GPTLOOP_VAR": "/srv", "GPTLOOP_REGISTRY": text})
    assert (directories.registry_url, directories.registry) == (url, Path(folder or "/srv/registry"))


@pytest.mark.parametrize("text", ["s3://", "s4://bucket", "http://bucket/x", "file://relative"])
def test_a_place_that_is_no_registry_is_rejected(text: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"^GPTLOOP_REGISTRY is '.+', but must be a folder, file:///FOLDER, or s3://"
    ):
        read_directories({"GPTLOOP_REGISTRY": text})
