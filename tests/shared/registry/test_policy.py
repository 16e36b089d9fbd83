"""Which version each label names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import NotFound
from shared.registry import policy
from shared.registry.decisions import Decided, Finding
from shared.registry.manifest import VersionManifest
from shared.registry.store import Checkpoint, Registry
from tests.shared.registry.scenarios import make_manifest, publish


def test_best_is_the_lowest_bits_per_byte_on_the_newest_evaluation_set(registry: Registry) -> None:
    publish(registry, bits_per_byte=0.1, evaluation_set="another text")
    publish(registry, bits_per_byte=0.9)
    publish(registry, bits_per_byte=0.7)
    publish(registry, bits_per_byte=0.8)
    assert registry.labels() == {"best": 3, "latest": 4}
    assert registry.resolve("best").version == 3
    with pytest.raises(NotFound, match=r"best \(version 3\)"):
        registry.resolve("stable")


def test_of_equally_good_versions_the_newest_is_best(registry: Registry) -> None:
    publish(registry)
    publish(registry)
    assert registry.labels()["best"] == 2


def test_neither_best_nor_latest_is_a_refused_version() -> None:
    versions = [make_manifest(number, bits_per_byte=bits) for number, bits in enumerate((0.8, 0.6, 0.7), 1)]
    assert policy.labels(versions, Decided(frozenset({2}))) == {"best": 3, "latest": 3}
    assert policy.labels(versions, Decided(frozenset({2, 3}))) == {"best": 1, "latest": 1}
    assert policy.labels(versions, Decided(frozenset({1, 2, 3}))) == {}


def test_where_the_first_version_on_a_new_text_is_refused_the_text_before_counts() -> None:
    versions = [make_manifest(1, bits_per_byte=0.5), make_manifest(2, evaluation_set="another text")]
    assert policy.labels(versions, Decided()) == {"best": 2, "latest": 2}
    assert policy.labels(versions, Decided(frozenset({2}))) == {"best": 1, "latest": 1}


def test_a_decision_names_a_version_only_while_it_is_there() -> None:
    versions = [make_manifest(number) for number in (3, 4)]
    named = {"best": 4, "latest": 4}
    assert policy.labels(versions, Decided(stable=3, pinned=3)) == named | {"stable": 3, "pinned:3": 3}
    assert policy.labels(versions, Decided(stable=2, pinned=5)) == named
    assert policy.labels([], Decided(stable=3, pinned=3)) == {}


@given(
    claims=st.dictionaries(st.integers(1, 9), st.sampled_from([0.5, 0.7, 0.9])),
    refused=st.sets(st.integers(1, 9)),
    stable=st.none() | st.integers(1, 9),
    pinned=st.none() | st.integers(1, 9),
)
def test_every_label_names_the_version_that_it_should(
    claims: dict[int, float], refused: set[int], stable: int | None, pinned: int | None
) -> None:
    versions = [make_manifest(number, bits_per_byte=bits) for number, bits in claims.items()]
    expected = {"stable": stable, f"pinned:{pinned}": pinned}
    expected = {label: number for label, number in expected.items() if number in claims}
    if deserving := claims.keys() - refused:
        expected["latest"] = max(deserving)
        expected["best"] = min(deserving, key=lambda number: (claims[number], -number))
    assert policy.labels(versions, Decided(frozenset(refused), stable, pinned)) == expected


def test_what_was_found_out_about_another_version_of_the_same_number_does_not_count(registry: Registry) -> None:
    publish(registry)
    registry.decisions.keep(1, Finding("another digest", "cpu", None, "lying", "It lies.", at=1.0))
    assert registry.labels()["best"] == 1


def test_damaged_decisions_leave_the_labels_of_the_manifests(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry)
    registry.decisions.set_stable(1)
    (registry.root / "serving" / "policy").write_text("newest")
    assert registry.labels() == {"best": 1, "latest": 1}
    assert "policy cannot be understood: 'newest' is no label" in caplog.text


def judged(manifest: VersionManifest, refusal: str | None = None) -> Finding:
    return Finding(manifest.digest, "cpu", None, refusal, "It is as it is.", at=1.0)


def test_labels_follow_what_was_found_out_and_decided(registry: Registry) -> None:
    versions = [publish(registry, bits_per_byte=bits) for bits in (0.7, 0.6, 0.8, 0.9)]
    registry.decisions.keep(1, judged(versions[0]))
    assert registry.labels() == {"best": 2, "latest": 4}
    registry.decisions.keep(2, judged(versions[1], "lying"))
    registry.decisions.set_stable(3)
    registry.decisions.set_policy("pinned:2")
    expected = {"best": 1, "latest": 4, "stable": 3, "pinned:2": 2}
    assert registry.labels() == Registry(registry.root).labels() == expected
    assert {label: registry.resolve(label).version for label in expected} == expected
    registry.decisions.forget(2)
    assert registry.labels()["best"] == 2


def test_a_removed_version_takes_its_labels_and_its_finding_along(registry: Registry) -> None:
    first, second = publish(registry), publish(registry)
    for manifest in (first, second):
        registry.decisions.keep(manifest.version, judged(manifest, "lying"))
    registry.decisions.set_stable(1)
    registry.decisions.set_policy("pinned:1")
    assert registry.labels() == {"stable": 1, "pinned:1": 1}
    registry.remove(Checkpoint(1))
    assert registry.labels() == {}
    assert registry.decisions.findings() == {2: [judged(second, "lying")]}
    with pytest.raises(NotFound, match="No version has the label 'stable'"):
        registry.resolve("stable")
