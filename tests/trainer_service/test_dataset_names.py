from pathlib import Path

import pytest

from shared.errors import GptloopError, InvalidArgument, NotFound
from trainer_service.dataset_names import expand


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder and the home folder, with some files."""
    for name in (
        "one.txt",
        "Two.TXT",
        "my file.txt",
        "it's.jsonl",
        "a*b.txt",
        "notes.md",
        "more/b.parquet",
        "more/a.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("builtin", ["builtin"]),
        ("roneneldan/TinyStories", ["roneneldan/TinyStories"]),
        ("one.txt", ["one.txt"]),
        ("one.txt Two.TXT", ["one.txt", "Two.TXT"]),
        ("my file.txt", ["my file.txt"]),
        ("'my file.txt' one.txt", ["my file.txt", "one.txt"]),
        (r"my\ file.txt one.txt", ["my file.txt", "one.txt"]),
        ("it's.jsonl", ["it's.jsonl"]),
        ("a*b.txt", ["a*b.txt"]),
        ("o*.txt", ["one.txt"]),
        ("[o]ne.txt", ["one.txt"]),
        ("more", ["more/a.txt", "more/b.parquet"]),
        ("one.txt more/", ["one.txt", "more/a.txt", "more/b.parquet"]),
        ("one.txt\n\tTwo.TXT\n", ["one.txt", "Two.TXT"]),
        ("absent.txt", ["absent.txt"]),
        ("", []),
        (" ", []),
    ],
)
def test_a_value_names_files_as_a_shell_would(folder: Path, value: str, names: list[str]) -> None:
    assert list(expand([value])) == names


def test_a_tilde_is_the_home_folder(folder: Path) -> None:
    assert expand(["~/one.txt", "~/m*e"]) == (str(folder / "one.txt"), str(folder / "more"))
    assert expand(["~/more"]) == (str(folder / "more/a.txt"), str(folder / "more/b.parquet"))


@pytest.mark.parametrize(
    ("value", "kind", "sentence"),
    [
        ("'my file", InvalidArgument, "quotes"),
        ("x*.txt", NotFound, "No file matches 'x\\*.txt'"),
        ("empty", NotFound, "holds no file"),
        ("their file.txt", NotFound, "There is no file 'their file.txt'"),
        ("wikitext103", InvalidArgument, "Did you mean wikitext-103"),
        ("bultin", InvalidArgument, "Did you mean builtin"),
    ],
)
def test_what_names_nothing_is_refused(folder: Path, value: str, kind: type[GptloopError], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        expand([value])


@pytest.mark.parametrize(
    "value", ["x" * 10_000, "null\0byte.txt", "~nobody-of-that-name/x.txt"], ids=["long", "null byte", "no such user"]
)
def test_names_that_no_file_can_have_are_left_to_the_check_of_files(folder: Path, value: str) -> None:
    assert expand([value]) == (value,)
