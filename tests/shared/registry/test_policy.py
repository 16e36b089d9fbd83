"""The version that each label names."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import InvalidArgument, NotFound
from shared.registry import policy
from shared.registry.decisions import BestBy, Decided
from shared.registry.evaluations import Figures
from shared.registry.findings import Finding
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint, Registry
from tests.records import write_record
from tests.registries import disk_registry, root_of
from tests.shared.registry.scenarios import make_manifest, publish


def test_best_has_the_lowest_bits_per_byte_on_the_leading_evaluation_set(registry: Registry) -> None:
    publish(registry, bits_per_byte=0.1, evaluation_set="another text")
    publish(registry, bits_per_byte=0.9)
    publish(registry, bits_per_byte=0.7)
    publish(registry, bits_per_byte=0.8)
    assert registry.labels() == {"best": 3, "latest": 4}
    assert registry.resolve("best").version == 3
    with pytest.raises(NotFound, match=r"best \(version 3\)"):
        registry.resolve("stable")


def trained(number: int, step: int, text: str = "set-a", **values: object) -> VersionManifest:
    """Returns a version that has trained on 100 tokens per step."""
    training = {"batch_size": 10, "context_length": 10, "max_steps": 1000}
    return replace(make_manifest(number, step=step, evaluation_set=text, training=training), **values)  # type: ignore[arg-type]


def best_of(*versions: VersionManifest) -> int:
    return policy.labels(versions, Decided())["best"]


def test_a_toy_run_on_other_text_does_not_replace_a_good_model_as_best() -> None:
    good = [trained(1, 80, bits_per_byte=1.0), trained(2, 400, bits_per_byte=0.5)]
    toys = [trained(number, 15 * (number - 2), "other", bits_per_byte=0.01) for number in range(3, 9)]
    assert best_of(*good, *toys) == 2
    assert policy.labels([*good, *toys], Decided())["latest"] == 8


def test_a_set_leads_from_half_the_tokens_of_the_best_version_on_and_then_the_lowest_loss_counts() -> None:
    good = [trained(1, 400, bits_per_byte=0.5)]
    others = [trained(2, 100, "other", bits_per_byte=2.0), trained(3, 199, "other", bits_per_byte=1.0)]
    assert best_of(*good, *others) == 1
    others.append(trained(4, 200, "other", bits_per_byte=1.5))
    assert best_of(*good, *others) == 3
    # The first set takes the lead back by the same rule.
    late = trained(5, 90, bits_per_byte=9.0)
    assert best_of(*good, *others, late) == 3
    assert best_of(*good, *others, replace(late, step=100)) == 1


def test_tokens_count_and_not_steps() -> None:
    wide = {"batch_size": 100, "context_length": 10}
    assert best_of(trained(1, 400), trained(2, 20, "other", training=wide)) == 2
    assert best_of(trained(1, 400), trained(2, 19, "other", training=wide)) == 1


def test_an_imported_version_leads_until_a_version_that_continues_it_does() -> None:
    trained_here = trained(1, 100_000)
    imported = trained(2, 0, "held-out of the import", preset="imported")
    assert best_of(trained_here, imported) == 2
    assert best_of(trained_here, imported, trained(3, 900_000)) == 2
    tuned = trained(4, 10, "text of the tuning", preset="imported", bits_per_byte=3.0)
    assert best_of(trained_here, imported, trained(3, 900_000), tuned) == 4


def test_a_version_with_unknown_tokens_does_not_take_the_lead() -> None:
    assert best_of(trained(1, 400), trained(2, 10**9, "other", training={"batch_size": "many"})) == 1
    assert best_of(trained(1, 400, training={}), trained(2, 1, "other")) == 2


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from("abc"), st.sampled_from([0.5, 0.7, 0.9]), st.booleans()),
        min_size=1,
        max_size=9,
    ),
    st.randoms(use_true_random=False),
)
def test_only_a_version_that_has_trained_enough_takes_the_lead(
    drawn: list[tuple[int, str, float, bool]], random: Random
) -> None:
    versions = [
        trained(number, step, text, bits_per_byte=bits, preset="imported" if imported else "demo")
        for number, (step, text, bits, imported) in enumerate(drawn, 1)
    ]
    before: VersionManifest | None = None
    for count in range(1, len(versions) + 1):
        best = policy.ranking(versions[:count])[0]
        newest = versions[count - 1]
        if before is not None and best.evaluation_set != before.evaluation_set:
            assert newest.evaluation_set == best.evaluation_set
            assert 2 * policy.trained_tokens(newest) >= policy.trained_tokens(before)
        assert best.bits_per_byte == min(
            each.bits_per_byte for each in versions[:count] if each.evaluation_set == best.evaluation_set
        )
        before = best
    # The order of the arguments does not matter.
    shuffled = random.sample(versions, len(versions))
    assert policy.ranking(shuffled) == policy.ranking(versions)


@pytest.mark.parametrize(
    ("best", "others", "sentence"),
    [
        (trained(1, 400), [trained(2, 80)], ""),
        (
            trained(1, 400),
            [trained(2, 15, "other", run="toy"), trained(3, 30, "other", run="toy")],
            "Versions 2 to 3 were judged on other held-out text than version 1, the best one; that run takes over at "
            "step 200. Until then `follow run:toy` lets the best of that run serve.",
        ),
        (
            trained(1, 400),
            [trained(2, 15, "other", run="toy", training={"batch_size": 1, "context_length": 3, "max_steps": 99})],
            "Version 2 was judged on other held-out text than version 1, the best one, and that run ends at step 99, "
            "before step 6,667, where it would take over. `follow run:toy` lets the best of that run serve.",
        ),
        (
            trained(1, 400, preset="imported"),
            [trained(2, 15, "other", run="toy")],
            "Version 2 was judged on other held-out text than version 1, the best one. `follow run:toy` lets the best "
            "of that run serve.",
        ),
        (trained(1, 400), [trained(2, 200, "other")], ""),
    ],
)
def test_a_sentence_says_when_newer_versions_on_other_text_take_the_lead(
    best: VersionManifest, others: list[VersionManifest], sentence: str
) -> None:
    assert policy.describe_unranked([best, *others], Decided()) == sentence


def test_without_versions_there_is_no_sentence() -> None:
    assert policy.describe_unranked([], Decided()) == ""
    assert policy.describe_unranked([], Decided(best_by=BestBy.EVALUATION)) == ""


def test_the_label_of_a_run_names_its_best_version_that_may_serve() -> None:
    versions = [
        trained(1, 10, run="one", bits_per_byte=0.9),
        trained(2, 20, run="one", bits_per_byte=0.7),
        trained(3, 30, run="two", bits_per_byte=0.1),
    ]
    assert policy.number_of("run:one", versions, Decided()) == 2
    assert policy.number_of("run:one", versions, Decided(frozenset({2}))) == 1
    assert policy.number_of("run:three", versions, Decided()) is None
    # It is listed only if it is the policy, so that retention keeps no other version of a run.
    assert policy.labels(versions, Decided()) == {"best": 3, "latest": 3}
    assert policy.labels(versions, Decided(policy="run:one")) == {"best": 3, "latest": 3, "run:one": 2}


def test_a_registry_resolves_the_label_of_any_run(registry: Registry) -> None:
    publish(registry, run="one")
    publish(registry, run="two")
    assert registry.resolve("run:one").version == 1
    with pytest.raises(NotFound, match="No version has the label 'run:three'"):
        registry.resolve("run:three")
    with pytest.raises(InvalidArgument, match="is not a label"):
        registry.resolve("run:../x")


def test_the_newest_of_equally_good_versions_is_best(registry: Registry) -> None:
    publish(registry)
    publish(registry)
    assert registry.labels()["best"] == 2


def test_best_and_latest_never_name_a_refused_version() -> None:
    versions = [make_manifest(number, bits_per_byte=bits) for number, bits in enumerate((0.8, 0.6, 0.7), 1)]
    assert policy.labels(versions, Decided(frozenset({2}))) == {"best": 3, "latest": 3}
    assert policy.labels(versions, Decided(frozenset({2, 3}))) == {"best": 1, "latest": 1}
    assert policy.labels(versions, Decided(frozenset({1, 2, 3}))) == {}


def test_a_refused_version_on_a_new_text_does_not_take_the_lead() -> None:
    versions = [make_manifest(1, bits_per_byte=0.5), make_manifest(2, evaluation_set="another text")]
    assert policy.labels(versions, Decided()) == {"best": 2, "latest": 2}
    assert policy.labels(versions, Decided(frozenset({2}))) == {"best": 1, "latest": 1}


def test_a_decision_names_a_version_only_while_it_exists() -> None:
    versions = [make_manifest(number) for number in (3, 4)]
    named = {"best": 4, "latest": 4}
    assert policy.labels(versions, Decided(stable=3, policy="pinned:3")) == named | {"stable": 3, "pinned:3": 3}
    assert policy.labels(versions, Decided(stable=2, policy="pinned:5")) == named
    assert policy.labels([], Decided(stable=3, policy="pinned:3")) == {}


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
    assert (
        policy.labels(versions, Decided(frozenset(refused), stable, f"pinned:{pinned}" if pinned else "best"))
        == expected
    )


def test_a_finding_about_another_version_with_the_same_number_does_not_count(registry: Registry) -> None:
    publish(registry)
    registry.decisions.keep(1, Finding("another digest", "cpu", None, "lying", "It lies.", at=1.0))
    assert registry.labels()["best"] == 1


def test_damaged_decisions_do_not_affect_labels_of_manifests(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    publish(registry)
    registry.decisions.set_stable(1)
    (root_of(registry) / "serving" / "policy").write_text("newest")
    assert registry.labels() == {"best": 1, "latest": 1}
    assert "policy cannot be understood: 'newest' is not a label" in caplog.text


def judged(manifest: VersionManifest, refusal: str | None = None) -> Finding:
    return Finding(manifest.digest, "cpu", None, refusal, "It is as it is.", at=1.0)


def test_labels_follow_findings_and_decisions(registry: Registry) -> None:
    versions = [publish(registry, bits_per_byte=bits) for bits in (0.7, 0.6, 0.8, 0.9)]
    registry.decisions.keep(1, judged(versions[0]))
    assert registry.labels() == {"best": 2, "latest": 4}
    registry.decisions.keep(2, judged(versions[1], "lying"))
    registry.decisions.set_stable(3)
    registry.decisions.set_policy("pinned:2")
    expected = {"best": 1, "latest": 4, "stable": 3, "pinned:2": 2}
    assert registry.labels() == disk_registry(root_of(registry)).labels() == expected
    assert {label: registry.resolve(label).version for label in expected} == expected
    registry.decisions.forget(2)
    assert registry.labels()["best"] == 2


def test_removing_a_version_removes_its_labels_and_its_finding(registry: Registry) -> None:
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


def evaluated(bits_per_byte: float, method: str = "aa", measured_at: float = 1.0) -> Figures:
    return Figures(method, "d", 1000, 2.0, None, None, 7.4, bits_per_byte, measured_at)


def by_evaluation(figures: dict[int, list[Figures]], refused: tuple[int, ...] = ()) -> Decided:
    return Decided(frozenset(refused), best_by=BestBy.EVALUATION, figures=figures)


def test_best_follows_evaluations_by_the_method_of_most_versions_if_it_should() -> None:
    versions = [trained(number, 10 * number, bits_per_byte=1 - number / 10) for number in range(1, 6)]
    figures = {
        1: [evaluated(0.5), evaluated(0.9, "bb", 2.0)],
        2: [evaluated(0.8, "bb", 3.0)],
        3: [evaluated(0.8, "bb", 4.0)],
        4: [evaluated(0.1)],
    }
    assert policy.labels(versions, Decided(figures=figures)) == {"best": 5, "latest": 5}
    assert policy.labels(versions, by_evaluation(figures)) == {"best": 3, "latest": 5}
    assert [each.version for each in policy.ranking(versions, by_evaluation(figures))] == [3, 2, 1]
    # The evaluations of refused versions do not count.
    assert policy.labels(versions, by_evaluation(figures, refused=(2,)))["best"] == 3
    assert policy.labels(versions, by_evaluation(figures, refused=(2, 3)))["best"] == 4
    assert policy.labels(versions, by_evaluation(figures, refused=(1, 2, 3)))["best"] == 4
    assert policy.labels(versions, by_evaluation(figures, refused=(1, 2, 3, 4)))["best"] == 5
    # Nor do those of versions that are gone.
    assert policy.labels(versions[3:], by_evaluation(figures))["best"] == 4


def test_without_evaluations_best_compares_training() -> None:
    versions = [trained(1, 400, bits_per_byte=0.5), trained(2, 10, "other", bits_per_byte=0.1)]
    assert policy.labels(versions, by_evaluation({}))["best"] == 1
    # An evaluation compares versions with other evaluation sets of training.
    assert policy.labels(versions, by_evaluation({1: [evaluated(0.9)], 2: [evaluated(0.8)]}))["best"] == 2


@given(
    st.dictionaries(
        st.integers(1, 6),
        st.lists(
            st.builds(evaluated, st.sampled_from([0.5, 0.7]), st.sampled_from("abc"), st.sampled_from([1.0, 2.0])),
            min_size=1,
            max_size=3,
            unique_by=lambda figures: figures.method_digest,
        ),
    ),
    st.sets(st.integers(1, 6)),
)
def test_best_was_evaluated_as_well_as_any_version_by_its_method(
    figures: dict[int, list[Figures]], refused: set[int]
) -> None:
    versions = [trained(number, number) for number in range(1, 7)]
    best = policy.labels(versions, by_evaluation(figures, tuple(refused))).get("best")
    deserving = {number: some for number, some in figures.items() if number not in refused}
    if not deserving:
        assert best == max(set(range(1, 7)) - refused, default=None)
        return
    assert best in deserving
    found = [(number, each) for number, some in deserving.items() for each in some]
    versions_of = Counter(each.method_digest for _, each in found)
    usual = max((versions_of[each.method_digest], each.measured_at) for _, each in found)
    methods = {each.method_digest for _, each in found if (versions_of[each.method_digest], each.measured_at) == usual}
    own = [each for each in deserving[best] if each.method_digest in methods]
    assert any(
        (each.bits_per_byte, -best)
        == min((other.bits_per_byte, -number) for number, other in found if other.method_digest == each.method_digest)
        for each in own
    )


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({}, "No version has an evaluation yet, so `best` compares the held-out loss of training."),
        ({3: [evaluated(0.5)]}, ""),
        (
            {1: [evaluated(0.5)], 3: [evaluated(0.5, measured_at=0.0, method="bb")]},
            "Versions 2 to 3 have no evaluation by the usual method, and `best` compares evaluations: "
            "`gptloop eval 3`.",
        ),
        (
            {2: [evaluated(0.5)]},
            "Version 3 has no evaluation by the usual method, and `best` compares evaluations: `gptloop eval 3`.",
        ),
    ],
)
def test_a_sentence_names_newer_versions_without_an_evaluation(
    figures: dict[int, list[Figures]], sentence: str
) -> None:
    versions = [trained(number, number) for number in range(1, 4)]
    assert policy.describe_unranked(versions, by_evaluation(figures)) == sentence
    assert policy.describe_unranked(versions, Decided(figures=figures)) == ""


def test_a_registry_with_that_rule_follows_the_records_at_once(registry: Registry) -> None:
    versions = [publish(registry, bits_per_byte=bits) for bits in (0.9, 0.7, 0.8)]
    following = disk_registry(root_of(registry), BestBy.EVALUATION)
    assert following.labels()["best"] == registry.labels()["best"] == 2
    write_record(registry, versions[2], 1.5)
    assert (following.resolve("best").version, registry.resolve("best").version) == (3, 2)
    write_record(registry, versions[0], 1.4)
    assert following.labels()["best"] == 1
    write_record(registry, versions[0], 1.6)
    assert following.labels()["best"] == 3
    # A damaged decision changes nothing.
    (root_of(registry) / "serving").mkdir(exist_ok=True)
    (root_of(registry) / "serving" / "policy").write_text("newest")
    assert following.labels()["best"] == 3
