from dataclasses import replace

import pytest

from shared.errors import FailedPrecondition
from tests.trainer_service.evaluation.records import METHOD, bare
from trainer_service.evaluation.comparison import compare, compare_all
from trainer_service.evaluation.record import Verdict

OTHER = replace(METHOD, window=256)


def test_a_version_with_a_lower_loss_in_each_document_is_better() -> None:
    before, after = [250.0 + 9 * unit for unit in range(40)], [249.0 + 9 * unit for unit in range(40)]
    found = compare(bare(3, before), bare(7, after))
    assert (found.before.number, found.after.number) == (3, 7)
    assert found.difference == pytest.approx(-0.01)
    assert found.interval is not None and found.interval.high == pytest.approx(-0.01)
    assert (found.verdict, found.unit, found.units, found.won, found.lost) == (Verdict.BETTER, "document", 40, 1.0, 0.0)
    assert compare(bare(7, after), bare(3, before)).verdict is Verdict.WORSE


def test_a_difference_that_documents_disagree_about_cannot_be_told() -> None:
    before = [250.0] * 40
    after = [250.0 + (8 if unit % 2 else -9) for unit in range(40)]
    found = compare(bare(3, before), bare(7, after))
    assert found.difference < 0
    assert (found.verdict, found.won, found.lost) == (Verdict.UNKNOWN, 0.5, 0.5)


def test_a_version_and_itself_cannot_be_told_apart() -> None:
    found = compare(bare(3, [250.0, 260.0]), bare(3, [250.0, 260.0]))
    assert (found.difference, found.verdict, found.won, found.lost) == (0.0, Verdict.UNKNOWN, 0.0, 0.0)


def test_a_single_document_gives_a_difference_without_a_verdict() -> None:
    found = compare(bare(3, [250.0]), bare(7, [240.0]))
    assert found.difference == pytest.approx(-0.1)
    assert found.interval is None and found.verdict is Verdict.UNKNOWN


def test_records_of_other_methods_are_not_compared() -> None:
    with pytest.raises(FailedPrecondition, match=r"^Version 7 is not compared with .* window 256 and 512\.$"):
        compare(bare(3, [1.0, 2.0]), bare(7, [1.0, 2.0], OTHER))


def test_records_without_figures_on_text_are_not_compared() -> None:
    with pytest.raises(FailedPrecondition, match=r"^Version 7 is not compared, because"):
        compare(bare(3, [1.0, 2.0]), bare(7))


def test_records_that_divide_the_text_differently_are_not_compared() -> None:
    with pytest.raises(FailedPrecondition, match="divide the text differently"):
        compare(bare(3, [1.0, 2.0]), bare(7, [1.0, 2.0, 3.0]))


def test_each_version_is_compared_with_each_earlier_one_of_its_method() -> None:
    units = [250.0, 260.0]
    found = compare_all([bare(3, units), bare(5, units), bare(8, units, OTHER), bare(7, units), bare(9, units, OTHER)])
    assert [(each.before.number, each.after.number) for each in found.pairs] == [(3, 5), (3, 7), (5, 7), (8, 9)]
    (note,) = found.notes
    assert note.startswith("Version 8 is not compared with version 3")


def test_a_record_without_figures_on_text_is_named_once() -> None:
    found = compare_all([bare(3, [1.0, 2.0]), bare(5), bare(7, [1.0, 2.0])])
    assert [(each.before.number, each.after.number) for each in found.pairs] == [(3, 7)]
    assert found.notes == ("Version 5 is not compared, because its record has no figures on text yet.",)
