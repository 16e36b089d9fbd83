from dataclasses import replace

import pytest

from tests.trainer_service.evaluation.records import METHOD, bare
from trainer_service.evaluation.record import Record, Standing, Verdict
from trainer_service.evaluation.verdict import CONTROL, Contender, judge_rivals


def contender(number: int, mean: float, role: str = "", tokens: int = 6400, units: int = 40) -> Contender:
    """Returns a version whose documents have losses around a mean; documents differ more than versions do."""
    nats = [100 * mean + (7 * unit) % 50 + (0.2 if (unit + number) % 2 else -0.2) for unit in range(units)]
    return Contender(role, bare(number, nats), tokens)


def judged(*rivals: Contender, mean: float = 2.0, promote: bool = False) -> Standing:
    return judge_rivals(contender(9, mean), rivals, promote)


def test_a_version_is_better_if_each_paired_interval_says_so() -> None:
    found = judged(contender(8, 2.1, CONTROL), contender(7, 2.2, "teacher 7"))
    assert found.better and not found.promoted
    assert [(each.role, each.version.number, each.verdict) for each in found.rivals] == [
        (CONTROL, 8, Verdict.BETTER),
        ("teacher 7", 7, Verdict.BETTER),
    ]
    assert [each.difference for each in found.rivals] == pytest.approx([-0.1, -0.2], abs=0.005)
    assert all(each.interval and each.interval.high < 0 for each in found.rivals)
    assert "Version 9 is better than control (version 8): -0." in found.sentence
    assert "; better than teacher 7 (version 7): -0." in found.sentence and "95 % interval" in found.sentence
    assert "stable" not in found.sentence and "promoted" not in found.sentence


@pytest.mark.parametrize(
    ("rival", "phrase"),
    [
        (contender(7, 1.9, "teacher 7"), "; worse than teacher 7 (version 7): +0.1"),
        (contender(7, 2.0, "before"), "; not clearly better or worse than before (version 7): "),
        (contender(11, 2.0, "a twin"), "; not clearly better or worse than a twin (version 11): +0.0000"),
    ],
)
def test_one_rival_that_is_not_clearly_worse_denies_the_promotion(rival: Contender, phrase: str) -> None:
    found = judged(contender(8, 2.1, CONTROL), rival, promote=True)
    assert not found.better and not found.promoted
    assert phrase in found.sentence
    assert found.sentence.endswith("It is not promoted, because it is not better than each of its rivals.")


def test_a_better_version_is_promoted_if_that_is_asked_for() -> None:
    found = judged(contender(8, 2.1, CONTROL), promote=True)
    assert found.better and found.promoted
    assert found.sentence.endswith("It is the stable version now.")


def test_a_version_whose_loss_may_be_too_low_is_not_promoted() -> None:
    better, doubt = contender(8, 2.1, CONTROL), "Its teacher has seen the text."
    found = judge_rivals(contender(9, 2.0), [better], True, [doubt])
    assert found.better and not found.promoted
    assert found.sentence.endswith(f"{doubt} It is not promoted, because its loss may be too low.")
    assert judge_rivals(contender(9, 2.0), [better], False, [doubt]).sentence.endswith(doubt)


def test_a_control_of_another_number_of_tokens_is_no_control() -> None:
    found = judged(contender(8, 2.1, CONTROL, tokens=3200), promote=True)
    (rival,) = found.rivals
    assert (rival.verdict, rival.difference, found.better) == (Verdict.NOT_COMPARED, None, False)
    assert rival.reason == "Version 8 is no control, because its run has 3,200 tokens and that of version 9 6,400."
    assert rival.reason in found.sentence
    # Teachers may have any number of tokens.
    assert judged(contender(8, 2.1, "teacher 8", tokens=3200)).better


def test_a_rival_with_another_tokenizer_is_not_compared_and_the_sentence_says_so() -> None:
    other = replace(METHOD, tokenizer="ee" * 32)
    record: Record = replace(contender(7, 2.5).record, method=other)
    found = judged(contender(8, 2.1, CONTROL), Contender("teacher 7", record, 1), promote=True)
    assert [each.verdict for each in found.rivals] == [Verdict.BETTER, Verdict.NOT_COMPARED]
    assert found.rivals[1].method_digest == other.digest
    assert "Version 9 is not compared with version 7" in found.sentence and "tokenizer" in found.sentence
    assert not found.better and not found.promoted


def test_a_text_of_few_documents_decides_nothing() -> None:
    few = [replace(contender(number, mean, units=3), role=CONTROL) for number, mean in ((9, 1.0), (8, 2.0))]
    found = judge_rivals(few[0], few[1:], promote=True)
    assert found.rivals[0].verdict is Verdict.UNKNOWN and not found.promoted
    assert "the text has no interval" in found.sentence


def test_a_verdict_is_part_of_the_file() -> None:
    standing = judged(contender(8, 2.1, CONTROL))
    record = replace(contender(9, 2.0).record, verdict=standing, measured_at={"verdict": 5.0})
    assert Record.from_json(record.to_json()) == record
    assert record.since(6.0).verdict is None and record.since(5.0).verdict == standing
