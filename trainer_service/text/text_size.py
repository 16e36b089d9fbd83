"""Estimates how much text a local file holds, without reading the text."""

from pathlib import Path

from trainer_service.text import zstd

# How many times smaller compression makes English text.
_TYPICAL_RATIO = 3
# gzip stores the decompressed size modulo this (RFC 1952, section 2.3.1).
_GZIP_MODULUS = 1 << 32


def estimate_characters(path: Path) -> int:
    """Returns about how many characters a .txt, .jsonl or .parquet file holds, compressed or not.

    A character counts as one byte, which overestimates text that is not ASCII. Reads at most a header or a footer of
    the file; raises `OSError` if that fails.
    """
    size_bytes = path.stat().st_size
    match path.suffix.lower():
        case ".gz":
            content_bytes = _gzip_content_bytes(path, size_bytes)
        case ".zst":
            with path.open("rb") as file:
                content_bytes = zstd.content_bytes(file) or 0
        case ".parquet":
            return _parquet_content_bytes(path, size_bytes)
        case _:
            return size_bytes
    # A content smaller than the file is that of one of several archives in the file.
    return content_bytes if content_bytes >= size_bytes else _TYPICAL_RATIO * size_bytes


def _gzip_content_bytes(path: Path, size_bytes: int) -> int:
    """Reads the size in the last four bytes, and adds the multiple of 4 GiB that gives the most typical ratio."""
    with path.open("rb") as file:
        file.seek(max(size_bytes - 4, 0))
        stored = int.from_bytes(file.read(4), "little")
    return stored + max(round((_TYPICAL_RATIO * size_bytes - stored) / _GZIP_MODULUS), 0) * _GZIP_MODULUS


def _parquet_content_bytes(path: Path, size_bytes: int) -> int:
    """Adds up the decompressed sizes of the column `text` in the footer."""
    # Loading pyarrow takes about a second, so only .parquet loads it.
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException:
        return _TYPICAL_RATIO * size_bytes
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == "text")
