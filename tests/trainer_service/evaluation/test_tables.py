from dataclasses import replace

from tests.trainer_service.evaluation.records import bare, full, judged
from trainer_service.evaluation.comparison import compare_all
from trainer_service.evaluation.tables import (
    comparison_table,
    grades_table,
    judged_table,
    memory_table,
    method_table,
    positions_table,
    quality_table,
    speed_table,
    versions_table,
    writing_table,
)
from trainer_service.evaluation.views.document import Table


def row(table: Table, name: str) -> tuple[str, ...]:
    (found,) = (cells[1:] for cells in table.rows if cells[0] == name)
    return found


def test_every_table_has_a_cell_for_each_heading() -> None:
    records = [full(3), bare(5), replace(full(7), judged=(judged(3), judged(5)))]
    tables = [
        judged_table,
        grades_table,
        quality_table,
        positions_table,
        writing_table,
        speed_table,
        memory_table,
        versions_table,
    ]
    for table in [*(each(records) for each in tables), method_table(records[0])]:
        assert {len(cells) for cells in table.rows} == {len(table.headings)}


def test_a_section_that_a_record_lacks_is_a_dash() -> None:
    records = [full(3, 2.5), bare(5)]
    assert row(quality_table(records), "overfitting") == ("slight", "-")
    assert row(speed_table(records), "8 requests, tokens/s") == ("905", "-")
    assert row(memory_table(records), "training, batch of 4: peak") == ("390 MiB", "-")
    assert row(positions_table(records), "positions 128-511") == ("2.6195", "-")


def test_figures_of_quality_stand_side_by_side() -> None:
    table = quality_table([full(3, 2.5), full(7, 2.25)])
    assert table.headings == ("version", "3", "7")
    assert row(table, "nats per token") == ("2.5195", "2.2695")
    assert row(table, "pairs, anaphor.jsonl") == ("87.4%", "87.4%")


def test_people_have_one_column_unless_their_figures_differ() -> None:
    first, second = full(3), full(7)
    assert writing_table([first, second]).headings == ("", "3", "7", "people")
    assert second.writing
    human = replace(second.writing.human, copied_longest=40)
    second = replace(second, writing=replace(second.writing, human=human))
    table = writing_table([first, second])
    assert table.headings == ("", "3", "7", "people, for 3", "people, for 7")
    assert row(table, "longest copy, most") == ("31 tokens", "31 tokens", "31 tokens", "40 tokens")


def test_a_comparison_is_a_row_with_its_verdict() -> None:
    (cells,) = comparison_table(compare_all([full(3, 2.5), full(7, 2.25)]).pairs).rows
    assert cells == ("7", "3", "-0.2500", "-0.2500 to -0.2500", "100% of 40 documents", "better")


def test_a_judgement_is_a_row_with_its_verdict_and_its_cost() -> None:
    records = [full(3), replace(full(7), judged=(judged(3), judged(5, "The judge guessed.")))]
    first, second = judged_table(records).rows
    expected = ("7", "3", "62.1%", "53.1 to 70.1%", "31 of 32", "75.0%", "95.2% of 21", "better", "$0.0123")
    assert first == expected
    assert (second[1], second[7]) == ("5", "none")
    assert grades_table(records).rows[:2] == (
        ("7 beside 3", "7.50", "6.25", "5.00"),
        ("3 beside 7", "7.00", "6.00", "5.50"),
    )
