import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.loss_curve import Point, draw

FALLING = [Point(step, 11.0 - step) for step in range(1, 11)]
POINTS = st.lists(st.builds(Point, st.integers(0, 10**6), st.floats(-1e300, 1e300) | st.just(math.nan)), max_size=50)


def test_the_curve_falls_between_its_extremes_and_held_out_losses_are_marks() -> None:
    assert draw(FALLING, [Point(1, 10.0), Point(10, 5.5)], 40, 7, is_unicode=False) == [
        "       loss: . training, o held-out",
        " 10.00 o.....",
        "             .......",
        "                    .......            o",
        "                           .......",
        "  1.00                            ......",
        "       step 1                         10",
    ]


def test_unicode_has_finer_dots() -> None:
    lines = draw(FALLING, [Point(10, 10.0)], 40, 6)
    assert lines[0].strip() == "loss: ⠒ training, ● held-out"
    assert lines[1].endswith("●") and lines[1].startswith(" 10.00 ⠉⠒⠒")
    assert lines[4].startswith("  1.00 ") and lines[5].endswith(" 10")
    assert all(0x2800 <= ord(each) < 0x2900 or each in " ●" for line in lines[1:5] for each in line[7:])


def test_a_column_shows_the_mean_of_its_steps() -> None:
    noisy = [Point(step, 5.0 + (-1) ** step) for step in range(1000)]
    lines = draw(noisy, [Point(0, 0.0), Point(999, 10.0)], 50, 13, is_unicode=False)
    assert lines[6] == " " * 7 + "." * 43
    assert not any("." in line[7:] for line in (*lines[1:6], *lines[7:12]))


@pytest.mark.parametrize("points", [[], [Point(1, 2.0)], [Point(1, 2.0), Point(2, math.nan)]])
def test_without_two_steps_nothing_is_drawn(points: list[Point]) -> None:
    assert draw(points, [], 80, 10) == []


@pytest.mark.parametrize(("width", "height"), [(18, 10), (80, 3), (0, 0)])
def test_without_room_nothing_is_drawn(width: int, height: int) -> None:
    assert draw(FALLING, [], width, height) == []


def test_equal_losses_are_a_line() -> None:
    assert len(draw([Point(1, 2.0), Point(2, 2.0)], [], 30, 6)) == 6


@given(POINTS, POINTS, st.integers(0, 120), st.integers(0, 30), st.booleans())
def test_every_line_fits(training: list[Point], held_out: list[Point], width: int, height: int, unicode: bool) -> None:
    lines = draw(training, held_out, width, height, unicode)
    assert len(lines) in (0, height)
    assert all(len(line) <= width for line in lines)
    assert unicode or all(line.isascii() for line in lines)
