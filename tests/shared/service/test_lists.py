import json
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.service.lists import Column, fitting, print_list, print_rows

Job = tuple[str, str, float, str]
JOBS: list[Job] = [
    ("524cfb1e", "demo-20261128-013242-ab12", 0.6489, "The text of a long reason " * 4),
    ("0e6a4a51", "small-20261128-013242-cd34", float("nan"), ""),
]
COLUMNS = (
    Column[Job]("job", lambda job: job[0]),
    Column[Job]("run", lambda job: job[1], rank=1),
    Column[Job]("held-out loss", lambda job: job[2], lambda job: f"{job[2]:.4f}", right=True),
    Column[Job]("reason", lambda job: job[3], wraps=True),
    Column[Job]("", lambda job: [job[0]], key="ids"),
)
Show = Callable[..., list[str]]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    """Prints a list to a terminal with this many columns, or to a file, and returns the lines without styles."""

    def show(rows: list[Job], columns: int | None, **options: bool | str) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(columns or 80))
        monkeypatch.setenv("FORCE_COLOR" if columns else "NO_COLOR", "1")
        print_list(rows, COLUMNS, **options)  # type: ignore[arg-type]
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return show


def test_a_wide_terminal_shows_every_column(show: Show) -> None:
    lines = show(JOBS, 200)
    assert lines[0].split() == ["job", "run", "held-out", "loss", "reason"]
    assert len(lines) == 3


@pytest.mark.parametrize("columns", [80, 60, 50])
def test_a_narrow_terminal_omits_columns_and_cuts_nothing(show: Show, columns: int) -> None:
    lines = show(JOBS, columns)
    assert max(map(len, lines)) <= columns
    assert lines[0].split() == ["job", *(["run"] * (columns == 80)), "held-out", "loss", "reason"]
    text = " ".join(lines)
    assert "524cfb1e" in text and "0.6489" in text and "…" not in text
    assert text.count("reason") == 1 + 4, "All words are there, wrapped."


def test_values_are_complete_on_a_terminal_that_is_too_narrow(show: Show) -> None:
    text = " ".join(show(JOBS, 10))
    assert "524cfb1e" in text and "0.6489" in text


def test_without_a_terminal_a_row_is_one_line_with_every_column(show: Show) -> None:
    lines = show(JOBS, None)
    assert len(lines) == 3 and JOBS[0][1] in lines[1] and JOBS[0][3].strip() in lines[1]


def test_json_has_numbers_and_lists_and_null_for_nan(show: Show) -> None:
    rows = json.loads("\n".join(show(JOBS, 60, as_json=True)))
    assert rows[0] == {
        "job": JOBS[0][0],
        "run": JOBS[0][1],
        "held_out_loss": 0.6489,
        "reason": JOBS[0][3],
        "ids": [JOBS[0][0]],
    }
    assert rows[1]["held_out_loss"] is None
    assert show([], 60, as_json=True, empty="No job yet.") == ["[]"]


def test_an_empty_list_is_a_sentence(show: Show) -> None:
    assert show([], 60, empty="No job yet.") == ["No job yet."]


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(("name",), [("[bold]a\x1b[2Jb\n\udc80.txt",)])
    assert capsys.readouterr().out.splitlines()[1].rstrip() == r"[bold]a\x1b[2Jb\n\udc80.txt"


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 4)), min_size=1), st.integers(0, 150))
def test_columns_are_omitted_by_rank_and_only_if_they_must(columns: list[tuple[int, int]], limit: int) -> None:
    widths, ranks = [width for width, _ in columns], [rank for _, rank in columns]

    def width(kept: list[int]) -> int:
        return sum(widths[index] for index in kept) + 2 * (len(kept) - 1)

    kept = fitting(widths, ranks, limit)
    assert all(before < after for before, after in pairwise(kept))
    assert {index for index, rank in enumerate(ranks) if rank == 0} <= set(kept)
    assert width(kept) <= limit or all(ranks[index] == 0 for index in kept)
    gone = [index for index in range(len(ranks)) if index not in kept]
    assert all(ranks[index] <= min(ranks[left] for left in gone) for index in kept if gone)
    if gone:
        last = min(gone, key=lambda index: (ranks[index], index))
        assert width([*kept, last]) > limit
