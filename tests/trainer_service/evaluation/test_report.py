import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.trainer_service.evaluation.records import METHOD, bare, full
from trainer_service.evaluation.comparison import compare_all
from trainer_service.evaluation.record import Record
from trainer_service.evaluation.report import build_report, summary
from trainer_service.evaluation.views.document import Note, Report, SideBySide
from trainer_service.evaluation.views.html import to_html

OTHER = replace(METHOD, window=256)


def report(*records: Record) -> Report:
    return build_report(records, compare_all(records), [])


def titles(*records: Record) -> list[str]:
    return [section.title for section in report(*records).sections]


def arrays(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, dict):
        for each in value.values():
            yield from arrays(each)
    elif isinstance(value, list):
        yield value
        for each in value:
            yield from arrays(each)


def test_a_report_has_every_section_of_its_records() -> None:
    assert titles(full(3), full(7)) == [
        "Versions",
        "Comparison",
        "Quality on held-out text",
        "Quality of what they write",
        "Speed",
        "Memory",
        "Texts side by side",
        "Method",
    ]
    assert report(full(3), full(7)).title == "Evaluation of versions 3 and 7"


def test_sections_that_no_record_has_are_left_out() -> None:
    assert titles(bare(3)) == ["Versions", "Method"]
    assert titles(bare(3, [250.0, 260.0])) == ["Versions", "Quality on held-out text", "Method"]


def test_figures_of_different_methods_never_share_a_table() -> None:
    units = [250.0, 260.0]
    made = report(bare(3, units), bare(7, units), bare(9, units, OTHER))
    assert [section.title for section in made.sections if "held-out" in section.title] == [
        "Quality on held-out text: versions 3 and 7",
        "Quality on held-out text: version 9",
    ]
    notes = [block.text for section in made.sections for block in section.blocks if isinstance(block, Note)]
    assert any("Version 9 is not compared with version 3" in note for note in notes)


def test_continuations_of_one_beginning_stand_side_by_side() -> None:
    (texts,) = (
        section for section in report(full(3, text="A."), full(7, text="B.")).sections if "Texts" in section.title
    )
    (block,) = texts.blocks
    assert isinstance(block, SideBySide)
    assert [(each.author, each.text) for each in block.passages] == [("version 3", "A."), ("version 7", "B.")]
    assert "longest copy 14 tokens" in block.passages[0].remark


def test_a_report_of_records_is_a_page() -> None:
    assert "&lt;b&gt;" in to_html(report(full(3, text="<b>"), bare(5), full(7)))


def test_the_summary_is_json_without_arrays_of_units() -> None:
    records = [full(3), replace(full(7), notes=("a note",)), bare(9, [float("nan")])]
    comparisons = compare_all(records[:2])
    found = json.loads(json.dumps(summary(records, comparisons), allow_nan=False))
    assert max(map(len, arrays(found))) <= 3
    assert found["versions"][1]["text"]["nats_per_token"] == records[1].text.nats_per_token  # type: ignore[union-attr]
    assert found["versions"][2]["text"]["nats_per_token"] is None
    assert found["versions"][0]["method_digest"] == METHOD.digest
    assert [(each["after"]["number"], each["verdict"]) for each in found["comparisons"]] == [(7, "cannot be told")]
    assert "Once upon a time" not in json.dumps(found)
