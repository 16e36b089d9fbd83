import re
from dataclasses import replace
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

from tests.trainer_service.evaluation.views.documents import PLOT
from trainer_service.evaluation.views.document import Line, Mark
from trainer_service.evaluation.views.plots import COLOURS, draw

# How red, green and blue in linear light appear to people without one kind of cone: Machado, Oliveira, Fernandes 2009,
# "A Physiologically-based Model for Simulation of Color Vision Deficiency", table 1, severity 1.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
STYLE = files("trainer_service.evaluation.views").joinpath("report.css").read_text(encoding="utf-8")


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lightness(colour: np.ndarray) -> float:
    return float(colour @ (0.2126, 0.7152, 0.0722))


def themes() -> list[dict[str, str]]:
    """Returns the colours for light and for dark pages."""
    found = re.findall(r"--([\w-]+): (#\w{6});", STYLE)
    half = len(found) // 2
    return [dict(found[:half]), dict(found[half:])]


def test_text_stays_text_and_colours_are_those_of_the_page() -> None:
    svg = draw(PLOT, "p")
    assert re.search(r">nats per token</text>", svg) and re.search(r">7</text>", svg)
    assert set(re.findall(r"var\(--([\w-]+)\)", svg)) == {"text", "rule", "line-0", "line-1"}
    assert "#0f0f0" not in svg


def test_a_name_with_signs_of_formulas_stays_as_it_is() -> None:
    svg = draw(replace(PLOT, marks=(Mark("$a_1$ <b>", 10.0, 2.0, 0),), x_label="$x", names=("_0", "$1$")), "p")
    assert ">$a_1$ &lt;b&gt;</text>" in svg and ">$1$</text>" in svg


@pytest.mark.parametrize("points", [(), (1.0,)])
def test_a_line_of_few_points_is_drawn(points: tuple[float, ...]) -> None:
    assert draw(replace(PLOT, lines=(Line("one", points, points, 0),), marks=(), from_zero=True), "p").endswith(
        "</svg>\n"
    )


@pytest.mark.parametrize("theme", themes())
def test_lines_stand_out_from_the_page(theme: dict[str, str]) -> None:
    page = lightness(linear(theme["page"]))
    for number in range(COLOURS):
        other = lightness(linear(theme[f"line-{number}"]))
        # WCAG 2.1, 1.4.11: a ratio of at least 3.
        assert (max(page, other) + 0.05) / (min(page, other) + 0.05) >= 3


@pytest.mark.parametrize("theme", themes())
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_first_colours_differ_for_people_with_other_colour_vision(theme: dict[str, str], deficiency: str) -> None:
    seen = [np.clip(np.array(DEFICIENCIES[deficiency]) @ linear(theme[f"line-{number}"]), 0, 1) for number in range(4)]
    for one, other in combinations(seen, 2):
        assert np.abs(np.cbrt(one) - np.cbrt(other)).max() > 0.1
