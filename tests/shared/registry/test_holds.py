import os
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from shared.registry.registry import Registry
from tests.registries import disk_registry, root_of

DAY_S = 24 * 3600.0


def age(path: Path, days: float) -> None:
    at_s = path.stat().st_mtime - days * DAY_S
    os.utime(path, (at_s, at_s))


def test_a_hold_counts_until_it_is_removed_or_older_than_any_job(registry: Registry) -> None:
    holds = registry.holds
    assert holds.jobs() == {} and list(holds.ages_s()) == []
    holds.add("a", 7)
    holds.add("b", 9)
    assert disk_registry(root_of(registry)).holds.jobs() == {7: "a", 9: "b"}
    age(root_of(registry) / "holds" / "b", 31)
    assert holds.jobs() == {7: "a"}
    holds.remove("a")
    holds.remove("a")
    assert holds.jobs() == {} and list(holds.ages_s()) == ["b"]


def test_a_job_can_hold_several_versions(registry: Registry) -> None:
    registry.holds.add("a", 7, 3)
    registry.holds.add("b", 3)
    assert (root_of(registry) / "holds" / "a").read_text() == "7 3"
    held = disk_registry(root_of(registry)).holds.jobs()
    assert held[7] == "a" and held[3] in ("a", "b")
    registry.holds.remove("a")
    assert registry.holds.jobs() == {3: "b"}


def test_a_job_can_hold_the_best_versions_of_runs(registry: Registry) -> None:
    registry.holds.add("a", "run:wide-g1", 7)
    assert (registry.holds.jobs(), registry.holds.runs()) == ({7: "a"}, {"wide-g1": "a"})


@pytest.mark.parametrize(
    "content",
    [
        b"7 ",
        b"7  9",
        b"7 nine",
        b"7 run:",
        b"run:a/b",
        b"best",
        b"7\n9",
        b"",
        b"seven",
        b"\xff",
        b"9" * 100,
        "٣".encode(),
    ],
)
def test_an_unreadable_hold_holds_nothing(registry: Registry, content: bytes) -> None:
    registry.holds.add("a", 7)
    (root_of(registry) / "holds" / "a").write_bytes(content)
    (root_of(registry) / "holds" / "no job").touch()
    assert registry.holds.jobs() == {} and registry.holds.runs() == {}


def test_a_hold_that_cannot_be_written_is_an_error(registry: Registry) -> None:
    root_of(registry).mkdir()
    (root_of(registry) / "holds").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        registry.holds.add("a", 7)
