import json
import os
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, NotFound
from shared.registry.store import Registry
from tests.fakes import publish_tiny_version


def record(bits_per_byte: float, measured_at: float, **text: object) -> str:
    figures = {"nats_per_token": 2.0, "perplexity": 7.4, "bits_per_byte": bits_per_byte, "interval": None}
    return json.dumps(
        {
            "method": {"text": {"tokens": 1000}},
            "text": {**figures, **text},
            "measured_at": {"text": measured_at},
        }
    )


def test_the_newest_record_comes_last_whatever_its_name(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "bb", record(1.5, measured_at=100.0))
    registry.evaluations.write(number, "aa", record(1.4, measured_at=200.0, interval={"low": 1.9, "high": 2.1}))
    first, last = registry.evaluations.figures(number)
    assert (first.method_digest, first.bits_per_byte, first.low, first.high) == ("bb", 1.5, None, None)
    assert (last.method_digest, last.bits_per_byte, last.low, last.high) == ("aa", 1.4, 1.9, 2.1)
    assert last.tokens == 1000


def test_a_replaced_record_is_read_again(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record(1.5, measured_at=100.0))
    assert [each.bits_per_byte for each in registry.evaluations.figures(number)] == [1.5]
    registry.evaluations.write(number, "aa", record(1.3, measured_at=100.0))
    assert [each.bits_per_byte for each in registry.evaluations.figures(number)] == [1.3]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"null",
        b'{"text": null}',
        b"[" * 100_000,
        b'{"version": 3, "bits_per_byte": 1.1}',  # of a program before records
        record(float("nan"), measured_at=100.0).encode(),
        record(1.5, measured_at=100.0).replace("1000", '"many"').encode(),
    ],
)
def test_a_file_without_figures_is_ignored(registry: Registry, content: bytes) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record(1.5, measured_at=100.0))
    registry.evaluations.path(number, "bb").write_bytes(content)
    assert [each.method_digest for each in registry.evaluations.figures(number)] == ["aa"]


def test_a_record_goes_with_its_version_and_none_is_written_for_a_removed_version(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record(1.5, measured_at=100.0))
    registry.remove_version(number)
    assert list(registry.evaluations.figures(number)) == []
    registry.evaluations.write(number, "aa", record(1.5, measured_at=100.0))
    with pytest.raises(NotFound, match=f"Version {number} has no evaluation aa"):
        registry.evaluations.read(number, "aa")


def test_a_record_that_cannot_be_written_is_an_error_and_leaves_no_file(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    (registry.root / "evaluations").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        registry.evaluations.write(number, "aa", record(1.5, measured_at=100.0))


def test_a_record_keeps_its_text(registry: Registry, tmp_path: Path) -> None:
    number = publish_tiny_version(registry, 1).version
    text = record(1.5, measured_at=100.0)
    registry.evaluations.write(number, "aa", text)
    assert registry.evaluations.read(number, "aa") == text
    assert os.listdir(registry.evaluations.folder(number)) == ["aa.json"]  # noqa: PTH208
