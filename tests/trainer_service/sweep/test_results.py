"""The table and the page of a sweep."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from shared.service import lists
from shared.service.lists import print_list
from tests.trainer_service.sweep.sweeps import Played
from trainer_service.evaluation.views.document import Note, Plot, Table
from trainer_service.evaluation.views.html import to_html
from trainer_service.jobs.events import JobState
from trainer_service.jobs.queue import JobQueue
from trainer_service.sweep.results import Result, columns, report, results


@pytest.fixture
def played(queue: JobQueue, tmp_path: Path) -> Played:
    """A sweep whose first candidate was stopped at the first rung, and the fourth has failed."""
    played = Played(queue, tmp_path)
    sweep = played.sweep()
    sweep.begin()
    played.end(4, JobState.FAILED, "It diverged.")
    for number, loss in ((1, 4.0), (2, 2.0), (3, 3.0)):
        played.train(number, loss)
    sweep.turn()
    return played


def finish(played: Played) -> None:
    played.train(3, 2.5)
    played.train(2, 1.5)
    sweep = played.sweep()
    sweep.begin()
    sweep.turn()
    played.train(2, 1.25)


def ranked(played: Played) -> list[Result]:
    sweep = played.sweep()
    sweep.begin()
    return results(sweep, sweep.jobs(), played.registry)


def table(found: Sequence[Result], played: Played, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns the lines of the table on a terminal of this width."""
    output = io.StringIO()

    def terminal(width: int = width) -> Console:
        return Console(file=output, force_terminal=True, no_color=True, width=width, legacy_windows=False)

    monkeypatch.setattr(lists, "Console", terminal)
    print_list(found, columns(found, played.sweep().halving))
    return [line.replace("\x1b[1m", "").replace("\x1b[0m", "").rstrip() for line in output.getvalue().splitlines()]


def test_the_furthest_come_first_and_of_those_the_lowest_loss(played: Played) -> None:
    finish(played)
    found = ranked(played)
    assert [(each.member.number, each.state, each.step) for each in found] == [
        *((2, "finished", 40), (3, "stopped", 20), (1, "stopped", 10), (4, "failed", 0))
    ]
    assert [dict(each.rungs) for each in found] == [{10: 2.0, 20: 1.5, 40: 1.25}, {10: 3.0, 20: 2.5}, {10: 4.0}, {}]
    assert [each.bits_per_byte for each in found] == [0.625, 1.25, 2.0, None]
    # 4,000 tokens at 50 a second.
    assert [each.training_s for each in found] == [80.0, 40.0, 20.0, 0.0]


def test_a_candidate_that_a_person_cancels_at_a_rung_was_not_stopped_by_the_sweep(played: Played) -> None:
    played.queue.cancel(played.job(2).id)
    assert {each.member.number: each.state for each in ranked(played)} == {
        **{1: "stopped", 2: "cancelled"},
        **{3: "queued", 4: "failed"},
    }


def test_an_unfinished_sweep_has_results_too(played: Played) -> None:
    played.train(3, 2.5)
    found = ranked(played)
    assert [(each.member.number, each.state) for each in found] == [
        *((3, "waits"), (2, "queued"), (1, "stopped"), (4, "failed"))
    ]


def test_without_a_history_the_last_evaluation_of_a_job_remains(played: Played) -> None:
    played.registry.histories.remove("try-1")
    assert [dict(each.rungs) for each in ranked(played) if each.member.number == 1] == [{10: 4.0}]


def test_the_table_fits_80_columns(
    played: Played, queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(played)
    narrow, wide = (table(ranked(played), played, width, monkeypatch) for width in (80, 200))
    assert max(map(len, narrow)) <= 80 and len(narrow) == len(wide) == 5
    assert narrow[1].split() == ["1", "2", "seed=2", "2.0000", "1.5000", "1.2500", "finished"]
    assert "bits per byte" in wide[0] and "time" in wide[0]


def test_a_table_with_long_values_fits_80_columns(
    queue: JobQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = Played(queue, tmp_path, tried="learning_rate=1e-3,2e-3 weight_decay=0.1,0.3 dropout=0,0.1")
    played.sweep().begin()
    played.train(1, 4.0)
    lines = table(ranked(played), played, 80, monkeypatch)
    assert max(map(len, lines)) <= 80 and "version" in lines[0]
    assert "learning_rate=1e-3" in lines[1] and "4.0000" in lines[1] and "weight_decay=0.1" in lines[2]


def test_json_has_what_the_table_leaves_out(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    finish(played)
    found = ranked(played)
    print_list(found, columns(found, played.sweep().halving), as_json=True)
    best, *_ = json.loads(capsys.readouterr().out)
    assert best == {
        "rank": 1,
        "candidate": 2,
        "values": {"seed": "2"},
        "loss_at_step_10": 2.0,
        "loss_at_step_20": 1.5,
        "loss_at_step_40": 1.25,
        "bits_per_byte": 0.625,
        "steps": 40,
        "training_seconds": 80.0,
        "state": "finished",
        "version": None,
        "run": "try-2",
        "job": played.job(2).id,
    }


def test_the_page_has_a_table_and_a_line_for_each_candidate_with_a_loss(played: Played) -> None:
    finish(played)
    page = report("try", ranked(played), played.sweep().halving)
    assert page.subtitle == "4 candidates: 4 to step 10, 2 to step 20, 1 to step 40."
    note, listed, plot = page.sections[0].blocks
    assert isinstance(note, Note) and isinstance(listed, Table) and isinstance(plot, Plot)
    assert [row[:3] for row in listed.rows] == [
        *(("1", "2", "seed=2"), ("2", "3", "seed=3"), ("3", "1", "seed=1"), ("4", "4", "seed=4"))
    ]
    assert [(line.name, line.x, line.y) for line in plot.lines] == [
        ("2: seed=2", (10.0, 20.0, 40.0), (2.0, 1.5, 1.25)),
        ("3: seed=3", (10.0, 20.0), (3.0, 2.5)),
        ("1: seed=1", (10.0,), (4.0,)),
    ]
    assert to_html(page).count("<li>") == 3


def test_many_candidates_are_drawn_and_the_best_are_named(queue: JobQueue, tmp_path: Path) -> None:
    played = Played(queue, tmp_path, tried=f"seed={','.join(map(str, range(1, 10)))}")
    played.sweep().begin()
    for number in range(1, 10):
        # The last one is worse than a model that has learned nothing.
        played.train(number, number / 2 if number < 9 else 99.0)
    *_, plot = report("try", ranked(played), played.sweep().halving).sections[0].blocks
    assert isinstance(plot, Plot)
    others, *named = plot.lines
    assert (others.name, others.colour, others.x[0], others.y[0]) == ("2 others", None, 10.0, 3.5)
    assert [line.name for line in named] == [f"{number}: seed={number}" for number in range(1, 7)]
    assert "var(--quiet)" in to_html(report("try", ranked(played), played.sweep().halving))


def test_before_the_first_evaluation_there_is_no_plot(queue: JobQueue, tmp_path: Path) -> None:
    played = Played(queue, tmp_path)
    played.sweep().begin()
    page = report("try", ranked(played), played.sweep().halving)
    assert len(page.sections[0].blocks) == 2
