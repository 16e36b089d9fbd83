"""The estimate of a file's text, which reads a header or a footer only."""

import gzip
import random
from pathlib import Path

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from trainer_service.text.stories import generate_stories
from trainer_service.text.text_size import estimate_characters

STORIES = list(generate_stories(5, range(200)))
TEXT = "\n".join(STORIES).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", TEXT), ("a.txt.gz", gzip.compress(TEXT)), ("a.jsonl.ZST", zstd(TEXT))]
)
def test_one_archive_gives_its_exact_size(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert estimate_characters(tmp_path / name) == len(TEXT)


@pytest.mark.parametrize("size_bytes", [0, 200, 300, 65_535 + 256, 65_536 + 256, 1 << 20])
def test_every_length_of_the_size_field_of_zstd_is_read(tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd(b"a" * size_bytes))
    expected = size_bytes or 3 * path.stat().st_size
    assert estimate_characters(path) == expected


def test_a_zstd_archive_without_a_size_field_has_a_typical_ratio(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(TEXT)
    assert estimate_characters(path) == 3 * path.stat().st_size


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_many_archives_in_one_file_have_a_typical_ratio(tmp_path: Path, name: str) -> None:
    compress = gzip.compress if name.endswith("gz") else zstd
    path = tmp_path / name
    path.write_bytes(b"".join(compress(story.encode()) for story in STORIES))
    assert estimate_characters(path) == 3 * path.stat().st_size


@pytest.mark.parametrize("gib", [3, 5, 9, 14])
def test_a_gzip_archive_of_more_than_4_gib_gets_back_what_its_size_field_lost(tmp_path: Path, gib: int) -> None:
    path = tmp_path / "a.txt.gz"
    with path.open("wb") as file:  # a sparse file
        file.truncate((gib << 30) // 3)
        file.seek(-4, 2)
        file.write(((gib << 30) % (1 << 32)).to_bytes(4, "little"))
    assert estimate_characters(path) == gib << 30


def test_parquet_counts_the_text_column_only(tmp_path: Path) -> None:
    generator = random.Random(1)
    table = pyarrow.table({"id": [generator.randbytes(500) for _ in STORIES], "text": STORIES})
    for compression in ("none", "zstd"):
        path = tmp_path / f"{compression}.parquet"
        pyarrow.parquet.write_table(table, path, compression=compression, row_group_size=50)
        assert estimate_characters(path) == pytest.approx(len(TEXT), rel=0.05)
    assert path.stat().st_size > len(TEXT) / 2


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"a", b"not an archive at all"])
def test_a_damaged_file_is_estimated_too(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert estimate_characters(tmp_path / name) >= 0


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        estimate_characters(tmp_path / "absent.txt.gz")
