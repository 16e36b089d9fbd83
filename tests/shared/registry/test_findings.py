"""Which refusals count, where, and how long."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shared.registry.commit import files_state
from shared.registry.findings import CORRUPT, WORSE, Finding, Findings
from shared.registry.store import Registry
from tests.shared.registry.scenarios import publish

FINDING = Finding("digest", "cpu", loss=2.5, refusal=None, sentence="", at=1.0)
# What was found out about versions 1 to 4, whose digests are "one" to "four".
DIGESTS = {1: "one", 2: "two", 3: "three", 4: "four"}


def findings(*found: Finding) -> Findings:
    """Those of version 7."""
    return Findings({7: "digest"}, {7: found}, {})


def refused(found: Mapping[int, Sequence[Finding]], gone: Sequence[int] = ()) -> set[int]:
    """The versions that must not serve on a CPU."""
    digests = {number: digest for number, digest in DIGESTS.items() if number not in gone}
    known = Findings(digests, found, {})
    return {
        number
        for number, digest in digests.items()
        if (finding := known.on(number, digest, "cpu")) is not None and finding.refusal is not None
    }


@pytest.mark.parametrize("reason", ["unfit", "rolled_back"])
def test_what_no_device_changes_counts_on_every_device(reason: str) -> None:
    refusal = replace(FINDING, device="metal", refusal=reason, at=2.0)
    found = findings(FINDING, refusal)
    assert found.on(7, "digest", "cpu") == found.on(7, "digest", "metal") == refusal
    assert found.refused_everywhere(7, "digest")
    # Until it is found out again.
    again = replace(FINDING, at=3.0)
    found = findings(FINDING, refusal, again)
    assert found.on(7, "digest", "cpu") == again
    assert not found.refused_everywhere(7, "digest")


@pytest.mark.parametrize("reason", ["not_finite", "lying", "failing"])
def test_what_a_device_computes_counts_on_that_device_alone(reason: str) -> None:
    refusal = replace(FINDING, device="metal", refusal=reason, at=2.0)
    found = findings(FINDING, refusal)
    assert found.on(7, "digest", "cpu") == FINDING
    assert found.on(7, "digest", "metal") == refusal
    assert not found.refused_everywhere(7, "digest")
    assert findings(refusal).refused_everywhere(7, "digest")


def test_what_was_found_out_about_another_version_does_not_count() -> None:
    found = findings(replace(FINDING, refusal="lying"))
    assert found.on(7, "another digest", "cpu") is None
    assert not found.refused_everywhere(7, "another digest")
    assert not found.refused_everywhere(6, "digest")


# Two versions, each with the other one.
PAIR = ((2, "two", "three"), (3, "three", "two"))


def worse(digest: str, than: str | None) -> Finding:
    return Finding(digest, "cpu", 3.0, WORSE, "It is worse.", 1.0, than)


def test_what_was_worse_than_a_version_may_serve_once_that_one_is_gone_or_refused() -> None:
    found: dict[int, list[Finding]] = {2: [worse("two", "one")]}
    assert refused(found) == {2}
    assert refused(found, gone=[1]) == set()
    found[1] = [replace(FINDING, digest="one", refusal="rolled_back")]
    assert refused(found) == {1}
    # Its loss stays known.
    known = Findings(DIGESTS, found, {}).on(2, "two", "cpu")
    assert known is not None and (known.loss, known.sentence) == (3.0, "")


def test_what_is_worse_than_a_worse_version_is_worse_still() -> None:
    assert refused({2: [worse("two", "one")], 3: [worse("three", "two")]}) == {2, 3}
    # Version 2 may serve then, but version 3 is worse than that one.
    assert refused({2: [worse("two", "one")], 3: [worse("three", "two")]}, gone=[1]) == {3}


def test_two_that_are_worse_than_each_other_do_not_hang() -> None:
    assert refused({2: [worse("two", "three")], 3: [worse("three", "two")]}) == {2, 3}


def test_two_that_name_each_other_in_their_refusals_do_not_hang() -> None:
    lying = {number: [replace(worse(digest, than), refusal="lying")] for number, digest, than in PAIR}
    assert refused(lying) == {2, 3}


def test_a_comparison_of_before_that_does_not_say_with_what_is_made_again() -> None:
    assert refused({2: [worse("two", None)]}) == set()


def test_what_was_corrupt_is_read_again_once_its_files_have_changed() -> None:
    corrupt = Finding("one", "cpu", None, CORRUPT, "It was changed.", 1.0, "state")
    for files, stands in (({1: "state"}, True), ({1: "other state"}, False), ({}, False)):
        found = Findings(DIGESTS, {1: [corrupt]}, files)
        assert (found.on(1, "one", "metal") == corrupt) is stands
        assert (found.on(1, "one", "metal") is None) is not stands
        assert found.refused_everywhere(1, "one") is stands


def test_what_was_found_out_a_moment_ago_counts_before_it_is_written() -> None:
    corrupt = Finding("one", "cpu", None, CORRUPT, "It was changed.", 2.0, "state")
    earlier = replace(FINDING, digest="one")
    found = Findings(DIGESTS, {1: [earlier]}, {})
    assert found.on(1, "one", "cpu") == earlier
    assert found.adding({1: corrupt}).on(1, "one", "cpu") == corrupt


def test_a_registry_does_not_name_what_is_refused_or_lacks_files(registry: Registry) -> None:
    first, second = publish(registry, bits_per_byte=0.5), publish(registry, bits_per_byte=0.6)
    registry.decisions.keep(1, Finding(first.digest, "cpu", 3.0, WORSE, "It is worse.", 1.0, second.digest))
    assert registry.labels()["best"] == 2
    registry.remove_version(2)
    assert registry.labels()["best"] == 1
    third = publish(registry, bits_per_byte=0.1).version
    path = registry.version_directory(third) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert registry.labels() == {"best": 1, "latest": 1}
    path.write_bytes(content)
    assert registry.labels() == {"best": third, "latest": third}


def test_a_corrupt_version_that_is_brought_back_may_serve(registry: Registry, tmp_path: Path) -> None:
    manifest = publish(registry)
    corrupt = Finding(manifest.digest, "cpu", None, CORRUPT, "x", 1.0, files_state(registry.version_directory(1)))
    registry.decisions.keep(1, corrupt)
    assert registry.labels() == {}
    path = registry.version_directory(1) / "model.safetensors"
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    assert registry.labels()["best"] == 1
