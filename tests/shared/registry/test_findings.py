"""Which refusals count, on which devices, and how long."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shared.registry.commit import files_state
from shared.registry.findings import CORRUPT, WORSE, Finding, Findings
from shared.registry.registry import Checkpoint, Registry
from tests.registries import version_folder
from tests.shared.registry.scenarios import publish

FINDING = Finding("digest", "cpu", loss=2.5, refusal=None, sentence="", at=1.0)
# The digests of versions 1 to 4.
DIGESTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def findings(*found: Finding) -> Findings:
    """Findings about version 7."""
    return Findings({7: "digest"}, {7: found}, {})


def refused(found: Mapping[int, Sequence[Finding]], gone: Sequence[int] = ()) -> set[int]:
    """Returns the versions that are refused on a CPU."""
    digests = {number: digest for number, digest in DIGESTS.items() if number not in gone}
    known = Findings(digests, found, {})
    return {
        number
        for number, digest in digests.items()
        if (finding := known.on(number, digest, "cpu")) is not None and finding.refusal is not None
    }


@pytest.mark.parametrize("reason", ["unfit", "rolled_back"])
def test_a_refusal_independent_of_the_device_counts_on_every_device(reason: str) -> None:
    refusal = replace(FINDING, device="metal", refusal=reason, at=2.0)
    found = findings(FINDING, refusal)
    assert found.on(7, "digest", "cpu") == found.on(7, "digest", "metal") == refusal
    assert found.refused_everywhere(7, "digest")
    # A later finding replaces it.
    again = replace(FINDING, at=3.0)
    found = findings(FINDING, refusal, again)
    assert found.on(7, "digest", "cpu") == again
    assert not found.refused_everywhere(7, "digest")


@pytest.mark.parametrize("reason", ["not_finite", "lying", "failing"])
def test_a_refusal_that_depends_on_the_device_counts_only_there(reason: str) -> None:
    refusal = replace(FINDING, device="metal", refusal=reason, at=2.0)
    found = findings(FINDING, refusal)
    assert found.on(7, "digest", "cpu") == FINDING
    assert found.on(7, "digest", "metal") == refusal
    assert not found.refused_everywhere(7, "digest")
    assert findings(refusal).refused_everywhere(7, "digest")


def test_a_finding_about_another_version_does_not_count() -> None:
    found = findings(replace(FINDING, refusal="lying"))
    assert found.on(7, "another digest", "cpu") is None
    assert not found.refused_everywhere(7, "another digest")
    assert not found.refused_everywhere(6, "digest")


# Two versions, each compared with the other one.
PAIR = ((2, "two", "three"), (3, "three", "two"))


def worse(digest: str, than: str | None) -> Finding:
    return Finding(digest, "cpu", 3.0, WORSE, "It is worse.", 1.0, than)


def test_a_worse_version_may_serve_once_the_better_one_is_gone_or_refused() -> None:
    found: dict[int, list[Finding]] = {2: [worse("two", "one")]}
    assert refused(found) == {2}
    assert refused(found, gone=[1]) == set()
    found[1] = [replace(FINDING, digest="one", refusal="rolled_back")]
    assert refused(found) == {1}
    # Its loss is still known.
    known = Findings(DIGESTS, found, {}).on(2, "two", "cpu")
    assert known is not None and (known.loss, known.sentence) == (3.0, "")


def test_a_version_that_is_worse_than_a_worse_one_is_worse() -> None:
    assert refused({2: [worse("two", "one")], 3: [worse("three", "two")]}) == {2, 3}
    # Version 2 may serve then, but version 3 is worse than version 2.
    assert refused({2: [worse("two", "one")], 3: [worse("three", "two")]}, gone=[1]) == {3}


def test_two_versions_that_are_worse_than_each_other_do_not_loop() -> None:
    assert refused({2: [worse("two", "three")], 3: [worse("three", "two")]}) == {2, 3}


def test_two_refusals_that_name_each_other_do_not_loop() -> None:
    lying = {number: [replace(worse(digest, than), refusal="lying")] for number, digest, than in PAIR}
    assert refused(lying) == {2, 3}


def test_a_comparison_without_the_other_version_does_not_count() -> None:
    assert refused({2: [worse("two", None)]}) == set()


def test_a_corrupt_version_is_read_again_once_its_files_have_changed() -> None:
    corrupt = Finding("one", "cpu", None, CORRUPT, "It was changed.", 1.0, "state")
    for files, stands in (({1: "state"}, True), ({1: "other state"}, False), ({}, False)):
        found = Findings(DIGESTS, {1: [corrupt]}, files)
        assert (found.on(1, "one", "metal") == corrupt) is stands
        assert (found.on(1, "one", "metal") is None) is not stands
        assert found.refused_everywhere(1, "one") is stands


def test_a_new_finding_counts_before_it_is_written() -> None:
    corrupt = Finding("one", "cpu", None, CORRUPT, "It was changed.", 2.0, "state")
    earlier = replace(FINDING, digest="one")
    found = Findings(DIGESTS, {1: [earlier]}, {})
    assert found.on(1, "one", "cpu") == earlier
    assert found.adding({1: corrupt}).on(1, "one", "cpu") == corrupt


def test_labels_never_name_a_refused_or_incomplete_version(registry: Registry) -> None:
    first, second = publish(registry, bits_per_byte=0.5), publish(registry, bits_per_byte=0.6)
    registry.decisions.keep(1, Finding(first.digest, "cpu", 3.0, WORSE, "It is worse.", 1.0, second.digest))
    assert registry.labels()["best"] == 2
    registry.remove(Checkpoint(2))
    assert registry.labels()["best"] == 1
    third = publish(registry, bits_per_byte=0.1).version
    path = version_folder(registry, third) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert registry.labels() == {"best": 1, "latest": 1}
    path.write_bytes(content)
    assert registry.labels() == {"best": third, "latest": third}


def test_a_corrupt_version_that_is_restored_may_serve(registry: Registry, tmp_path: Path) -> None:
    manifest = publish(registry)
    corrupt = Finding(manifest.digest, "cpu", None, CORRUPT, "x", 1.0, files_state(version_folder(registry, 1)))
    registry.decisions.keep(1, corrupt)
    assert registry.labels() == {}
    path = version_folder(registry, 1) / "model.safetensors"
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    assert registry.labels()["best"] == 1
