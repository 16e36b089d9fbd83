"""The dashboards are what Grafana reads, and name the metrics that exist."""

import re
from typing import Any

import pytest

from tests.monitoring import PROMETHEUS, alerts, dashboards, documented_queries, metrics_in, panels, records
from tests.pages import rows

METRICS = {row[0]: row[1] for row in rows("Metrics")}
# What stands in no dashboard, and why.
NOT_SHOWN = {
    "gptloop_inference_tls_certificate_expiry_timestamp_seconds": "an alert watches it; without TLS it does not exist",
    "gptloop_training_tls_certificate_expiry_timestamp_seconds": "an alert watches it; without TLS it does not exist",
}
KINDS = {"row", "stat", "timeseries", "state-timeline"}
# Those of Grafana's units that the dashboards use; an unknown one is shown as a suffix.
UNITS = {"short", "s", "bytes", "percentunit", "reqps", "sci"}
BOARDS = [pytest.param(each, id=name) for name, each in dashboards().items()]


def series() -> set[str]:
    """Returns the names under which Prometheus knows the metrics of the services."""
    parts = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
    return {f"{name}{part}" for name, kind in METRICS.items() for part in parts.get(kind, ("",))}


def test_every_metric_in_an_expression_exists() -> None:
    named = {
        **{f"{panel.dashboard}: {panel.title}": " ".join(panel.queries) for panel in panels()},
        **{name: alert["expr"] for name, alert in alerts().items()},
        **records(),
        **{each: each for each in documented_queries()},
    }
    for where, text in named.items():
        unknown = metrics_in(text) - series() - records().keys()
        assert not unknown, f"{where} names what does not exist: {sorted(unknown)}."


def test_every_metric_with_a_name_in_opentelemetry_exists() -> None:
    page = (PROMETHEUS / "queries.md").read_text(encoding="utf-8").partition("## Names of OpenTelemetry")[2]
    assert metrics_in(page)
    assert metrics_in(page) <= METRICS.keys()


def test_every_metric_stands_in_a_dashboard_or_has_a_reason_why_not() -> None:
    text = " ".join(query for panel in panels() for query in panel.queries)
    # A recorded series stands for those that it is computed from.
    text += " ".join(expression for name, expression in records().items() if name in text)
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) if name not in METRICS else name for name in metrics_in(text)}
    assert METRICS.keys() - shown == NOT_SHOWN.keys()
    assert all(NOT_SHOWN.values())


@pytest.mark.parametrize("board", BOARDS)
def test_every_panel_says_what_it_shows(board: dict[str, Any]) -> None:
    for panel in board["panels"]:
        assert panel["type"] in KINDS, panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        for target in panel["targets"]:
            assert target.keys() == {"refId", "expr", "legendFormat"}, panel["title"]


@pytest.mark.parametrize("board", BOARDS)
def test_every_dashboard_has_its_own_names_and_the_variables_that_it_uses(board: dict[str, Any]) -> None:
    every = [each["uid"] for each in dashboards().values()]
    assert every.count(board["uid"]) == 1 and len(board["uid"]) <= 40
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {each["name"] for each in board["templating"]["list"]} | {"__rate_interval", "__range"}
    assert set(re.findall(r"\$\{?(\w+)", str(board["panels"]))) <= variables


@pytest.mark.parametrize("board", BOARDS)
def test_no_panel_covers_another_one_or_leaves_the_page(board: dict[str, Any]) -> None:
    taken = set[tuple[int, int]]()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
