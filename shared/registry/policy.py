"""The versions that labels name."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shared.registry.decisions import LABELS, BestBy, Decided, pinned_number, run_label, run_of
from shared.registry.evaluations import Figures, comparable
from shared.registry.manifest import IMPORTED, VersionManifest

# A version with another evaluation set takes the lead once it has trained on this share of the best one's tokens.
_SHARE = 0.5
# A larger batch size or context length is not believed.
_MAX_PER_STEP = 2**31


@dataclass(frozen=True)
class Lead:
    """The evaluation set on which `best` compares, and the first version with which it leads."""

    evaluation_set: str
    since: VersionManifest


def latest(versions: Sequence[VersionManifest]) -> VersionManifest | None:
    """Returns the newest version."""
    return max(versions, key=lambda version: version.version, default=None)


def trained_tokens(version: VersionManifest) -> float:
    """Returns how many tokens a version has trained on, including those of the versions that it continues.

    Returns infinity for an imported version and for those that continue it, because its tokens are unknown and a person
    chose it, and 0 if the manifest does not say.
    """
    return math.inf if version.preset == IMPORTED else float(version.step * _tokens_per_step(version))


def leading(versions: Sequence[VersionManifest]) -> Lead | None:
    """Returns the leading evaluation set, or None if there is no version.

    The set of the first version leads until a version with another set has trained on at least half as many tokens as
    the best version of the leading set.
    """
    lead: Lead | None = None
    best: dict[str, VersionManifest] = {}
    for version in sorted(versions, key=lambda version: version.version):
        evaluation_set = version.evaluation_set
        best[evaluation_set] = min(best.get(evaluation_set, version), version, key=_rank)
        if lead is None or (
            evaluation_set != lead.evaluation_set
            and trained_tokens(version) >= _SHARE * trained_tokens(best[lead.evaluation_set])
        ):
            lead = Lead(evaluation_set, version)
    return lead


def rated(versions: Sequence[VersionManifest], decided: Decided) -> dict[int, Figures]:
    """Returns the figures of the versions that `best` compares by their evaluations; none if it compares by training.

    These are the versions that were evaluated by the method that most of them have.
    """
    if decided.best_by is BestBy.TRAINING:
        return {}
    numbers = {each.version for each in versions}
    return comparable({number: figures for number, figures in decided.figures.items() if number in numbers})


def ranking(versions: Sequence[VersionManifest], decided: Decided | None = None) -> list[VersionManifest]:
    """Returns the versions that `best` compares: lowest bits per byte first, then the newest.

    Without evaluations to compare, these are the versions with the leading evaluation set.
    """
    if decided is not None and (figures := rated(versions, decided)):
        compared = [each for each in versions if each.version in figures]
        return sorted(compared, key=lambda each: (figures[each.version].bits_per_byte, -each.version))
    lead = leading(versions)
    return sorted((each for each in versions if lead and each.evaluation_set == lead.evaluation_set), key=_rank)


def ranking_of_run(versions: Sequence[VersionManifest], run: str) -> list[VersionManifest]:
    """Returns the versions of a run: lowest bits per byte first, then the newest."""
    return sorted((version for version in versions if version.run == run), key=_rank)


def number_of(label: str, versions: Sequence[VersionManifest], decided: Decided) -> int | None:
    """Returns the number of the version that a label names, if there is one.

    `best`, `latest` and `run:<name>` follow from the manifests and the evaluations, and never name a refused version.
    `stable` and `pinned:<version>` are decisions of a person.
    """
    deserving = [version for version in versions if version.version not in decided.refused]
    named: VersionManifest | None
    if label == "best":
        named = next(iter(ranking(deserving, decided)), None)
    elif label == "latest":
        named = latest(deserving)
    elif (run := run_of(label)) is not None:
        named = next(iter(ranking_of_run(deserving, run)), None)
    else:
        number = decided.stable if label == "stable" else pinned_number(label)
        named = next((version for version in versions if version.version == number), None)
    return None if named is None else named.version


def labels(versions: Sequence[VersionManifest], decided: Decided) -> dict[str, int]:
    """Returns every label that names a version; of `run:` and `pinned:` labels only the policy."""
    named = {label: number_of(label, versions, decided) for label in (*LABELS, decided.policy)}
    return {label: number for label, number in named.items() if number is not None}


def labels_of(number: int, labels: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the labels that name a version."""
    return tuple(label for label, named in labels.items() if named == number)


def describe_labels(labels: Mapping[str, int]) -> str:
    """Describes the existing labels, for the error about a missing one."""
    if not labels:
        return "the registry is still empty"
    return "the labels are " + ", ".join(f"{label} (version {number})" for label, number in labels.items())


def describe_unranked(versions: Sequence[VersionManifest], decided: Decided) -> str:
    """Returns a sentence about newest versions that do not compare with the best one, or an empty text."""
    deserving = [version for version in versions if version.version not in decided.refused]
    figures = rated(deserving, decided)
    if not figures:
        unrated = "No version has an evaluation yet, so `best` compares the held-out loss of training."
        sentences = (unrated if deserving and decided.best_by is BestBy.EVALUATION else "", _other_text(deserving))
        return " ".join(filter(None, sentences))
    newer = sorted(each.version for each in deserving if each.version > max(figures))
    if not newer:
        return ""
    have = f"Versions {newer[0]} to {newer[-1]} have" if len(newer) > 1 else f"Version {newer[0]} has"
    return f"{have} no evaluation by the usual method, and `best` compares evaluations: `gptloop eval {newer[-1]}`."


def _other_text(deserving: Sequence[VersionManifest]) -> str:
    """Returns a sentence about newest versions with another evaluation set than the leading one, or an empty text.

    It says when the newest versions take the lead, and how to serve them before.
    """
    newest, ranked = latest(deserving), ranking(deserving)
    if newest is None or newest.evaluation_set == ranked[0].evaluation_set:
        return ""
    best = ranked[0]
    others = sorted(
        each.version
        for each in deserving
        if (each.evaluation_set, each.run) == (newest.evaluation_set, newest.run) and each.version > best.version
    )
    sentence = f"Versions {others[0]} to {others[-1]} were" if len(others) > 1 else f"Version {newest.version} was"
    sentence += f" judged on other held-out text than version {best.version}, the best one"
    serve = f"`follow {run_label(newest.run)}` lets the best of that run serve."
    per_step = _tokens_per_step(newest)
    if not per_step or math.isinf(trained_tokens(best)):
        return f"{sentence}. {serve}"
    step = math.ceil(_SHARE * trained_tokens(best) / per_step)
    end = newest.training.get("max_steps")
    if isinstance(end, int) and step > end:
        return f"{sentence}, and that run ends at step {end:,}, before step {step:,}, where it would take over. {serve}"
    return f"{sentence}; that run takes over at step {step:,}. Until then {serve}"


def _rank(version: VersionManifest) -> tuple[float, int]:
    return version.bits_per_byte, -version.version


def _tokens_per_step(version: VersionManifest) -> int:
    """Returns the tokens of a training step, or 0 if the manifest does not say, or not plausibly."""
    factors = (version.training.get("batch_size"), version.training.get("context_length"))
    sensible = [factor for factor in factors if isinstance(factor, int) and 0 < factor < _MAX_PER_STEP]
    return math.prod(sensible) if len(sensible) == len(factors) else 0
