"""The alerts, their tests for promtool, and the runbook belong together."""

import re

import yaml  # type: ignore[import-untyped]

from deploy.commands import COMMANDS
from deploy.make import known_settings
from tests.monitoring import PROMETHEUS, alerts, records

RUNBOOK = (PROMETHEUS / "runbook.md").read_text(encoding="utf-8")


def test_every_alert_has_its_entry_in_the_runbook_and_every_entry_its_alert() -> None:
    assert re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE) != []
    assert set(re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)) == set(alerts())


def test_every_entry_says_what_it_means_what_users_see_how_to_look_and_what_to_do() -> None:
    for entry in re.split(r"^## ", RUNBOOK, flags=re.MULTILINE)[1:]:
        name = entry.split()[0]
        for part in ("**Meaning**", "**Users see**", "**Look**"):
            assert part in entry, (name, part)
        assert "**Do**" in entry or "**Look** and **do**" in entry, name


def test_every_alert_has_a_severity_and_texts_and_leads_to_its_entry() -> None:
    for name, alert in alerts().items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert alert["annotations"]["runbook_url"] == f"deploy/prometheus/runbook.md#{name.lower()}"
        assert alert["annotations"]["summary"] and alert["annotations"]["description"].endswith("."), name


def test_promtool_tests_that_every_alert_fires_and_that_it_does_not() -> None:
    tested = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fires, is_silent = set[str](), set[str]()
    for check in (check for test in tested for check in test["promql_expr_test"]):
        named = re.findall(r'alertname=~?"([^"]+)"', str(check["exp_samples"])) or re.findall(
            r'alertname=~?"([^"]+)"', check["expr"]
        )
        matching = {name for name in alerts() if any(re.fullmatch(each, name) for each in named)}
        samples = check["exp_samples"]
        if not named and samples and all(sample["value"] == 0 for sample in samples):
            matching = set(alerts())
        (is_silent if all(sample["value"] == 0 for sample in samples) else fires).update(matching)
    assert fires == set(alerts())
    assert is_silent == set(alerts())


def test_every_recorded_series_is_used_by_an_alert() -> None:
    expressions = " ".join(alert["expr"] for alert in alerts().values())
    assert all(name in expressions for name in records())


def test_the_runbook_names_only_commands_and_settings_that_exist() -> None:
    assert set(re.findall(r"`gptloop ([a-z]+)", RUNBOOK)) <= set(COMMANDS)
    named = set(re.findall(r"`((?:GPTLOOP|REDIS)_[A-Z_]+)`", RUNBOOK))
    assert named
    assert named <= known_settings() | {"REDIS_URL"}
