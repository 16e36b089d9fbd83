"""The files of Prometheus and Grafana, as tests read them."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml  # type: ignore[import-untyped]  # its stubs are no dependency

from tests.workplace import PROJECT

PROMETHEUS = PROJECT / "deploy" / "prometheus"
GRAFANA = PROJECT / "deploy" / "grafana"

# What may be written for the variables of Grafana in a query.
VARIABLES = {"$__rate_interval": "1m", "$__range": "10m", "$instance": ".*"}
# `gptloop_…`, also behind `__name__=~`, where one of two names stands in parentheses.
_NAME = re.compile(r"gptloop_\w+(?::\w+)*")
_ALTERNATIVES = re.compile(r"gptloop_\(([a-z|]+)\)(\w+)")


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard, and its queries as Grafana sends them."""

    dashboard: str
    title: str
    queries: tuple[str, ...]


def dashboards() -> dict[str, Mapping[str, Any]]:
    """Returns the dashboards by the names of their files."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((GRAFANA / "dashboards").glob("*.json"))
    }


def panels() -> Iterator[Panel]:
    """Yields every panel that has queries."""
    for name, dashboard in dashboards().items():
        for panel in dashboard["panels"]:
            if targets := panel.get("targets"):
                yield Panel(name, panel["title"], tuple(query(target["expr"]) for target in targets))


def query(expression: str) -> str:
    """Returns the expression of a panel with values for Grafana's variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def documented_queries() -> list[str]:
    """Returns the queries of queries.md."""
    page = (PROMETHEUS / "queries.md").read_text(encoding="utf-8")
    return re.findall(r"^\| .* \| `(.+)` \|$", page, re.MULTILINE)


def groups() -> list[Mapping[str, Any]]:
    """Returns the groups of rules."""
    return list(yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))["groups"])


def alerts() -> dict[str, Mapping[str, Any]]:
    """Returns the alerts by name."""
    return {rule["alert"]: rule for group in groups() for rule in group["rules"] if "alert" in rule}


def records() -> dict[str, str]:
    """Returns the expressions of the recording rules by name."""
    return {rule["record"]: rule["expr"] for group in groups() for rule in group["rules"] if "record" in rule}


def metrics_in(expression: str) -> set[str]:
    """Returns the names of gptloop's metrics in an expression."""
    plain = _ALTERNATIVES.sub(
        lambda found: " ".join(f"gptloop_{each}{found[2]}" for each in found[1].split("|")), expression
    )
    return set(_NAME.findall(plain))
