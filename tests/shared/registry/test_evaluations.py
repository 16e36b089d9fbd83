import errno
import os
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, NotFound
from shared.registry.evaluations import Figures, comparable, one_of_each
from shared.registry.registry import Checkpoint, Registry
from tests.fakes import publish_tiny_version
from tests.records import record, write_record
from tests.registries import evaluation_folder, root_of
from tests.shared.registry.scenarios import publish


def test_the_newest_record_comes_last_whatever_its_name(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "bb", record("d", 1.5, measured_at=100.0))
    registry.evaluations.write(number, "aa", record("d", 1.4, measured_at=200.0, interval={"low": 1.9, "high": 2.1}))
    first, last = registry.evaluations.figures(number)
    assert (first.method_digest, first.bits_per_byte, first.low, first.high) == ("bb", 1.5, None, None)
    assert (last.method_digest, last.bits_per_byte, last.low, last.high) == ("aa", 1.4, 1.9, 2.1)
    assert last.tokens == 1000


def test_a_replaced_record_is_read_again(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record("d", 1.5, measured_at=100.0))
    assert [each.bits_per_byte for each in registry.evaluations.figures(number)] == [1.5]
    registry.evaluations.write(number, "aa", record("d", 1.3, measured_at=100.0))
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
        record("d", float("nan"), measured_at=100.0).encode(),
        record("d", 1.5, measured_at=100.0).replace("1000", '"many"').encode(),
        record("d", 1.5, measured_at=100.0).replace("1000", "1e400").encode(),
        record("d", 1.5, measured_at=100.0).replace("1000", "9" * 30).encode(),
        record("d", 1.5, measured_at=1e30).encode(),
        record("d", 1.5, measured_at=100.0, nats_per_token=-1.0).encode(),
        record("d", 1.5, measured_at=100.0, perplexity=10**400).encode(),
        record("d", 1.5, measured_at=100.0).replace('"d"', "1" * 400).encode(),
        record("d", 1.5, measured_at=100.0).replace('"d"', "7").encode(),
    ],
)
def test_a_file_without_figures_is_ignored(registry: Registry, content: bytes) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record("d", 1.5, measured_at=100.0))
    (evaluation_folder(registry, number) / "bb.json").write_bytes(content)
    assert [each.method_digest for each in registry.evaluations.figures(number)] == ["aa"]


def test_a_record_goes_with_its_version_and_none_is_written_for_a_removed_version(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    registry.evaluations.write(number, "aa", record("d", 1.5, measured_at=100.0))
    registry.remove(Checkpoint(number))
    assert list(registry.evaluations.figures(number)) == []
    registry.evaluations.write(number, "aa", record("d", 1.5, measured_at=100.0))
    with pytest.raises(NotFound, match=f"Version {number} has no evaluation aa"):
        registry.evaluations.read(number, "aa")


def test_a_record_that_cannot_be_written_is_an_error_and_leaves_no_file(registry: Registry) -> None:
    number = publish_tiny_version(registry, 1).version
    (root_of(registry) / "evaluations").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        registry.evaluations.write(number, "aa", record("d", 1.5, measured_at=100.0))


def test_a_record_keeps_its_text(registry: Registry, tmp_path: Path) -> None:
    number = publish_tiny_version(registry, 1).version
    text = record("d", 1.5, measured_at=100.0)
    registry.evaluations.write(number, "aa", text)
    assert registry.evaluations.read(number, "aa") == text
    assert os.listdir(evaluation_folder(registry, number)) == ["aa.json"]  # noqa: PTH208


def test_a_file_with_another_name_is_no_record(registry: Registry) -> None:
    version = publish(registry)
    write_record(registry, version, 1.5)
    for name in ("aa.json.new", "notes.json", "AA.json", "aa"):
        evaluation_folder(registry, 1).joinpath(name).write_text(record(version.digest, 1.1, measured_at=200.0))
    assert [each.bits_per_byte for each in registry.evaluations.figures(1)] == [1.5]


def test_the_record_of_another_version_with_the_same_number_does_not_count(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    write_record(registry, first, 1.5)
    registry.evaluations.write(second.version, "aa", record(first.digest, 1.4, measured_at=200.0))
    found = registry.evaluations.of([first, second])
    assert {number: [each.bits_per_byte for each in some] for number, some in found.items()} == {1: [1.5]}


def test_a_file_is_read_once_and_forgotten_with_its_version(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [publish(registry), publish(registry)]
    for version in versions:
        write_record(registry, version, 1.5)
    (evaluation_folder(registry, 1) / "bb.json").write_text("{}")
    registry.evaluations.of(versions)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read again"))
    assert set(registry.evaluations.of(versions)) == {1, 2}
    assert set(registry.evaluations.of(versions[:1])) == {1}
    assert set(registry.evaluations._known) == {1}


def test_figures_stay_while_the_disk_fails_to_read_them(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    version = publish(registry)
    write_record(registry, version, 1.5)
    before = registry.evaluations.of([version])
    write_record(registry, version, 1.4)

    def fails(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        assert registry.evaluations.of([version]) == before != {}
    assert registry.evaluations.of([version])[1][0].bits_per_byte == 1.4


def figures(method: str, measured_at: float) -> Figures:
    return Figures(method, "d", 1000, 2.0, None, None, 7.4, 1.5, measured_at)


def test_only_figures_by_the_method_of_most_versions_compare() -> None:
    old, new, newest, other = figures("aa", 1.0), figures("bb", 2.0), figures("bb", 4.0), figures("cc", 3.0)
    found = {1: [old], 2: [old, new], 3: [newest], 4: [old, other]}
    assert comparable(found) == {1: old, 2: old, 4: old}
    assert one_of_each(found) == {1: old, 2: old, 3: newest, 4: old}
    # Of two methods that two versions have, the newer one.
    found = {1: [old], 2: [old, new], 3: [newest], 4: [other]}
    assert comparable(found) == {2: new, 3: newest}
    assert one_of_each(found) == {1: old, 2: new, 3: newest, 4: other}
    assert one_of_each({2: [new, other], 3: [newest]}) == {2: new, 3: newest}
    assert comparable({}) == one_of_each({}) == {}
