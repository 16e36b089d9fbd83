"""Which of two versions predicts the held-out text better, by records of one method. Loads no model framework."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from shared.errors import FailedPrecondition
from trainer_service.evaluation.record import Interval, Record, Subject, TextQuality, Verdict
from trainer_service.evaluation.statistics import paired_interval


@dataclass(frozen=True)
class Comparison:
    """How `after` differs from `before` on one text.

    difference: in nats per token; below 0 if `after` is better.
    interval: of `difference`, from paired units; None if the text has few units.
    verdict: on `after`.
    won, lost: the shares of units (`unit`: documents or passages) that `after` predicts better and worse.
    """

    before: Subject
    after: Subject
    difference: float
    interval: Interval | None
    verdict: Verdict
    unit: str
    units: int
    won: float
    lost: float


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of several versions, and sentences about what cannot be compared."""

    pairs: tuple[Comparison, ...]
    notes: tuple[str, ...]


def compare(before: Record, after: Record) -> Comparison:
    """Compares two versions on the same units of text.

    Raises `FailedPrecondition`, which says what differs, if the methods differ or a record has no figures on text.
    """
    if differences := list(after.method.differences(before.method)):
        raise FailedPrecondition(
            f"Version {after.version.number} is not compared with version {before.version.number}, because their "
            f"evaluations differ: {'; '.join(differences)}."
        )
    first, second = _quality(before), _quality(after)
    if first.unit_tokens != second.unit_tokens:
        raise FailedPrecondition(
            f"Version {after.version.number} is not compared with version {before.version.number}, because their "
            "records divide the text differently; evaluate both again."
        )
    nats = tuple(zip(first.unit_nats, second.unit_nats, strict=True))
    interval = paired_interval(first.unit_nats, second.unit_nats, first.unit_tokens)
    return Comparison(
        before=before.version,
        after=after.version,
        difference=math.fsum(theirs - ours for ours, theirs in nats) / sum(first.unit_tokens),
        interval=interval,
        verdict=_verdict(interval),
        unit=first.unit,
        units=len(nats),
        won=sum(theirs < ours for ours, theirs in nats) / len(nats),
        lost=sum(theirs > ours for ours, theirs in nats) / len(nats),
    )


def compare_all(records: Sequence[Record]) -> Comparisons:
    """Compares each record with each earlier one of the same method; notes say which versions are not compared."""
    pairs, notes = list[Comparison](), list[str]()
    groups = by_method(records)
    for group in groups:
        for before, after in combinations(group, 2):
            try:
                pairs.append(compare(before, after))
            except FailedPrecondition as error:
                notes.append(str(error))
    # One sentence for each method is enough.
    for group in groups[1:]:
        try:
            compare(groups[0][0], group[0])
        except FailedPrecondition as error:
            notes.append(str(error))
    return Comparisons(tuple(pairs), tuple(dict.fromkeys(notes)))


def by_method(records: Sequence[Record]) -> list[list[Record]]:
    """Returns the records in groups with the same method, in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.method.digest, []).append(record)
    return list(groups.values())


def _quality(record: Record) -> TextQuality:
    if record.text is None:
        raise FailedPrecondition(
            f"Version {record.version.number} is not compared, because its record has no figures on text yet."
        )
    return record.text


def _verdict(interval: Interval | None) -> Verdict:
    if interval is not None and interval.high < 0:
        return Verdict.BETTER
    if interval is not None and interval.low > 0:
        return Verdict.WORSE
    return Verdict.UNKNOWN
