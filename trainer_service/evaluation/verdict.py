"""The verdict on a version beside its rivals: the teachers, the version before, a control. Loads no model framework."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import FailedPrecondition
from trainer_service.evaluation.comparison import compare
from trainer_service.evaluation.record import Opponent, Record, Standing, Verdict

# The role of the version that was trained for as many tokens without what is judged.
CONTROL = "control"


@dataclass(frozen=True)
class Contender:
    """A version in a role, its record, and the number of target tokens in the whole schedule of its run."""

    role: str
    record: Record
    tokens: int


def judge_rivals(
    version: Contender, rivals: Sequence[Contender], promote: bool, doubts: Sequence[str] = ()
) -> Standing:
    """Compares a version with each of its rivals, of which there is at least one, on the same text.

    promote: whether the version shall be promoted if it is better than each of them.
    doubts: sentences about reasons for which its loss may be too low; with any of them it is not promoted.
    """
    assert rivals
    opponents = tuple(_opponent(version, rival) for rival in rivals)
    better = all(each.verdict is Verdict.BETTER for each in opponents)
    promoted = better and promote and not doubts
    sentences = [*_sentences(version.record, opponents), *doubts]
    if promoted:
        sentences.append("It is the stable version now.")
    elif promote:
        reason = "its loss may be too low" if better else "it is not better than each of its rivals"
        sentences.append(f"It is not promoted, because {reason}.")
    return Standing(opponents, better, promoted, " ".join(sentences))


def _opponent(version: Contender, rival: Contender) -> Opponent:
    names = rival.role, rival.record.version, rival.record.method.digest
    try:
        if rival.role == CONTROL and rival.tokens != version.tokens:
            raise FailedPrecondition(
                f"Version {rival.record.version.number} is no control, because its run has {rival.tokens:,} tokens and "
                f"that of version {version.record.version.number} {version.tokens:,}."
            )
        found = compare(rival.record, version.record)
    except FailedPrecondition as error:
        return Opponent(*names, None, None, Verdict.NOT_COMPARED, str(error))
    return Opponent(*names, found.difference, found.interval, found.verdict)


def _sentences(record: Record, opponents: Sequence[Opponent]) -> list[str]:
    compared = [_phrase(each) for each in opponents if each.difference is not None]
    sentences = [f"Version {record.version.number} is {'; '.join(compared)}."] if compared else []
    return [*sentences, *dict.fromkeys(each.reason for each in opponents if each.reason)]


def _phrase(each: Opponent) -> str:
    way = "not clearly better or worse than" if each.verdict is Verdict.UNKNOWN else f"{each.verdict.value} than"
    interval = each.interval
    sure = f"95 % interval {interval.low:+.4f} to {interval.high:+.4f}" if interval else "the text has no interval"
    return f"{way} {each.role} (version {each.version.number}): {each.difference:+.4f} nats per token ({sure})"
