"""What lists print."""

import json
from pathlib import Path

import pytest

from shared.registry.decisions import BestBy
from shared.registry.registry import Registry
from tests.records import write_record
from tests.registries import disk_registry
from tests.shared.registry.scenarios import publish
from trainer_service.listings import print_checkpoints


def lines(registry: Registry, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_checkpoints(registry, as_json=False)
    return capsys.readouterr().out.splitlines()


def test_versions_are_listed_with_their_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    registry = disk_registry(tmp_path)
    versions = [publish(registry, bits_per_byte=bits) for bits in (0.7, 0.8, 0.9)]
    assert "evaluated" not in lines(registry, capsys)[0]
    write_record(registry, versions[0], 1.6, "aa", 100.0)
    write_record(registry, versions[2], 1.5, "bb", 200.0, interval={"low": 1.9, "high": 2.1})
    heading, *rows = lines(registry, capsys)
    place = slice(heading.index("evaluated") - 2, heading.index("evaluated") + len("evaluated"))
    # The first one was measured by another method than the newest one.
    assert [row[place].strip() for row in rows] == ["(1.6000)", "", "1.5000"]
    print_checkpoints(registry, as_json=True)
    evaluations = [row["evaluation"] for row in json.loads(capsys.readouterr().out)]
    assert evaluations[1] is None
    assert evaluations[2] == {
        "method_digest": "bb",
        "version_digest": versions[2].digest,
        "tokens": 1000,
        "nats_per_token": 2.0,
        "low": 1.9,
        "high": 2.1,
        "perplexity": 7.4,
        "bits_per_byte": 1.5,
        "measured_at": 200.0,
    }


def test_a_sentence_says_that_the_newest_version_has_no_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = disk_registry(tmp_path, BestBy.EVALUATION)
    versions = [publish(registry), publish(registry)]
    write_record(registry, versions[0], 1.6)
    assert lines(registry, capsys)[-1].startswith("Version 2 has no evaluation by the usual method")
    write_record(registry, versions[1], 1.7)
    assert not lines(registry, capsys)[-1].startswith("Version 2")
