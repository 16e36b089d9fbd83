import io

import pytest
from rich.console import Console

from shared.service.live_bar import LiveBar, fitting

FACTS = ("step 27/100", "loss 6.313", "ETA 17 min", "3,862 tokens/s", "best held-out 10.500", "lr 3.00e-03")


def frame(width: int, fraction: float | None, *facts: str) -> str:
    """Returns what one refresh draws on a terminal of this width."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    bar = LiveBar(console)
    bar.show(fraction, *facts)
    with console.capture() as capture:
        console.print(bar)
    return capture.get().removesuffix("\n")


@pytest.mark.parametrize(
    ("width", "last"), [(200, "lr 3.00e-03"), (120, "lr 3.00e-03"), (80, "3,862 tokens/s"), (60, "ETA 17 min")]
)
def test_a_bar_and_the_most_important_facts_are_on_one_line(width: int, last: str) -> None:
    line = frame(width, 0.27, *FACTS)
    assert len(line) < width and "\n" not in line
    assert line.endswith(last)
    assert len(line.partition(" 27%")[0]) >= 8 and "━" in line


@pytest.mark.parametrize("width", range(1, 40))
def test_even_the_narrowest_terminal_shows_one_line(width: int) -> None:
    for fraction in (None, 0.27):
        line = frame(width, fraction, *FACTS)
        assert len(line) <= width and "\n" not in line


def test_facts_keep_their_order_and_none_is_skipped() -> None:
    assert fitting(FACTS, 24) == "step 27/100  loss 6.313"
    assert fitting(("a", "much too long", "b"), 6) == "a"
    assert fitting(("文字", "b"), 4) == "文字"
    assert fitting((), 10) == ""
