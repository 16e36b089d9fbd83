import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import Any

from rich.console import Console

from tests.trainer_service.evaluation.records import METHOD, bare, full, judged
from trainer_service.evaluation.comparison import compare_all
from trainer_service.evaluation.record import Record
from trainer_service.evaluation.report import build_report, summary
from trainer_service.evaluation.verdict import Contender, judge_rivals
from trainer_service.evaluation.views.document import Note, Report, SideBySide, Table
from trainer_service.evaluation.views.html import to_html
from trainer_service.evaluation.views.markdown import to_markdown
from trainer_service.evaluation.views.terminal import print_report

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


def test_a_judgement_has_a_section_with_its_verdict_or_the_reason_for_none() -> None:
    made = report(full(3), replace(full(7), judged=(judged(3), judged(5, "The judge guessed."))))
    (section,) = (section for section in made.sections if section.title == "Judged by a large teacher")
    notes = [block.text for block in section.blocks if isinstance(block, Note)]
    assert "There is no verdict on version 7 beside version 5: The judge guessed." in notes
    assert notes[-1] == (
        "Judged by openai/gpt-oss-20b with the wording judge-1; configuration fp_1, fp_2; questions without an answer: "
        "1 empty, 2 malformed."
    )
    for page in (to_html(made), to_markdown(made)):
        assert "62.1%" in page and "53.1 to 70.1%" in page and "The judge guessed." in page


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


def test_a_verdict_has_a_section_with_each_role_in_every_view() -> None:
    rival, version = full(3, 2.6), full(7, 2.4)
    verdict = judge_rivals(Contender("", version, 1), [Contender("control", rival, 1)], promote=True)
    made = report(rival, replace(version, verdict=verdict))
    (section,) = (section for section in made.sections if section.title == "Verdict on version 7")
    table, sentence, *notes = section.blocks
    assert isinstance(table, Table) and isinstance(sentence, Note)
    assert table.rows == (
        ("control", "3", "2.6195", "0.9430", "-0.2000", "-0.2000 to -0.2000", "better"),
        ("this version", "7", "2.4195", "0.8710", "-", "-", "promoted"),
    )
    assert sentence.text == verdict.sentence
    assert notes[1:] == [Note("The control was trained for as many tokens without the teacher.")]
    console = Console(file=StringIO(), width=100)
    print_report(made, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for page in (to_html(made), to_markdown(made), printed):
        assert "Verdict on version 7" in page and "control" in page and "It is the stable version now." in page
    beside = judge_rivals(Contender("", version, 1), [Contender("before", rival, 1)], promote=True)
    assert "The control" not in to_markdown(report(rival, replace(version, verdict=beside)))
    # The figures of a rival whose record is not in the report are absent.
    (alone,) = (each for each in report(replace(version, verdict=verdict)).sections if "Verdict" in each.title)
    assert isinstance(alone.blocks[0], Table) and alone.blocks[0].rows[0][2:4] == ("-", "-")
