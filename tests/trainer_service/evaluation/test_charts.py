from dataclasses import replace

import pytest

from shared.registry.history import EvaluationLine, History, ReportLine
from tests.trainer_service.evaluation.records import bare, full
from trainer_service.evaluation.charts import decoding_speed, loss_by_position, loss_over_tokens, training_memory
from trainer_service.evaluation.views.document import Mark


def history(run: str, published: dict[int, int], reports: int = 4) -> History:
    """Returns a history of 100 tokens a step; `published` has the version of each evaluated step."""
    return History(
        run,
        tuple(ReportLine(step, 100 * step, 5 - step / 1000, 0.0, 0.0, 0.0, 0, 0, 0, 0.0, 1) for step in range(reports)),
        tuple(EvaluationLine(step, 100 * step, 3.0, 1.0, version, 0.0, 1) for step, version in published.items()),
    )


def test_the_versions_of_the_report_are_marked_on_the_loss_of_their_run() -> None:
    plot = loss_over_tokens(
        [history("calm", {1: 3, 2: 4, 3: 5}), history("wild", {3: 7})], [bare(3), bare(7, run="wild")]
    )
    assert plot
    assert [line.name for line in plot.lines] == [
        "calm, training",
        "calm, held-out",
        "wild, training",
        "wild, held-out",
    ]
    assert plot.marks == (Mark("3", 100, 3.0, 0), Mark("7", 300, 3.0, 1))
    assert "3.0000 after 300 tokens of run wild" in plot.description


def test_a_long_history_becomes_means() -> None:
    plot = loss_over_tokens([history("calm", {}, reports=10_000)], [])
    assert plot
    (line,) = plot.lines
    assert 200 <= len(line.x) <= 300
    assert line.x[0] == 1650.0
    assert line.y[0] == pytest.approx(5 - 0.0165)


def test_without_what_they_show_there_are_no_plots() -> None:
    assert loss_over_tokens([], [bare(3)]) is None
    assert loss_over_tokens([History("calm", (), ())], [bare(3)]) is None
    assert (loss_by_position([bare(3)]), decoding_speed([bare(3)]), training_memory([bare(3)])) == (None, None, None)


def test_a_version_has_the_same_colour_in_each_plot() -> None:
    records = [bare(3), full(5), full(7)]
    position, speed = loss_by_position(records), decoding_speed(records)
    assert position and speed
    assert [(line.name, line.colour) for line in position.lines] == [("version 5", 1), ("version 7", 2)]
    assert [(line.name, line.colour) for line in speed.lines] == [("version 5", 1), ("version 7", 2)]
    assert position.names == ("0-31", "32-127", "128-511")


def test_memory_is_drawn_once_for_each_run_beside_its_estimate() -> None:
    plot = training_memory([full(3), full(5), full(7, run="wild")])
    assert plot
    assert [(line.name, line.y) for line in plot.lines] == [
        ("version 5, measured", (390.0,)),
        ("version 5, estimated", (415.0,)),
        ("version 7, measured", (390.0,)),
        ("version 7, estimated", (415.0,)),
    ]


def test_a_value_that_is_not_finite_is_left_out() -> None:
    record = full(3)
    assert record.text
    first, *others = record.text.positions
    positions = (replace(first, nats_per_token=float("nan")), *others)
    plot = loss_by_position([replace(record, text=replace(record.text, positions=positions))])
    assert plot and plot.lines[0].x == (1.0, 2.0)
