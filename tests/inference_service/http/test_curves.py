"""What the page reads of histories: columns that grow, and the end of each run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_service.http.curves import Curves
from shared.errors import NotFound
from shared.registry.history import EvaluationLine, HistoryWriter, ReportLine
from shared.registry.registry import Registry
from tests.registries import disk_registry, run_folder


def report(step: int, attempt: int = 1) -> ReportLine:
    return ReportLine(step, 100 * step, 1 / step, 1e-3, 0.1, 5.0, 1, 2, 3, 1.7e9 + step, attempt)


def evaluation(step: int, version: int | None) -> EvaluationLine:
    return EvaluationLine(step, 100 * step, 2 / step, 1 / step, version, 1.7e9 + step, 1)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path)


@pytest.fixture
def curves(registry: Registry) -> Iterator[Curves]:
    yield Curves(registry.histories)


def writer(registry: Registry, run: str, step: int = 0) -> HistoryWriter:
    return registry.histories.writer(registry.take_over(run), step)


def test_a_cursor_brings_only_the_lines_after_it(registry: Registry, curves: Curves) -> None:
    calm = writer(registry, "calm")
    calm.append(report(1), report(2), evaluation(2, 7))
    first = curves.since("calm", "")
    assert not first["continues"]
    assert first["reports"]["step"] == [1, 2]
    assert first["reports"]["loss"] == [1.0, 0.5]
    assert first["evaluations"]["version"] == [7]
    calm.append(report(3), evaluation(3, None))
    second = curves.since("calm", first["cursor"])
    assert second["continues"]
    assert second["reports"]["step"] == [3]
    assert second["evaluations"] == {
        "step": [3],
        "tokens": [300],
        "validation_loss": [2 / 3],
        "bits_per_byte": [1 / 3],
        "version": [0],
        "time": [1.7e9 + 3],
        "attempt": [1],
    }
    assert curves.since("calm", second["cursor"])["reports"]["step"] == []


def test_a_run_that_was_cut_back_comes_whole(registry: Registry, curves: Curves) -> None:
    writer(registry, "calm").append(report(1), report(2), report(3))
    cursor = curves.since("calm", "")["cursor"]
    writer(registry, "calm", step=1).append(report(2, attempt=2), report(3, attempt=2), report(4, attempt=2))
    again = curves.since("calm", cursor)
    assert not again["continues"]
    assert again["reports"]["step"] == [1, 2, 3, 4]
    assert again["reports"]["attempt"] == [1, 2, 2, 2]


@pytest.mark.parametrize("cursor", ["1", "a.b.c", "00000000.1.1", "...", "1.²."])
def test_another_cursor_brings_all_lines(registry: Registry, curves: Curves, cursor: str) -> None:
    writer(registry, "calm").append(report(1))
    known = curves.since("calm", "")["cursor"].partition(".")[0]
    for each in (cursor, f"{known}.x.0", f"{known}.-1.0", f"{known}.²."):
        answer = curves.since("calm", each)
        assert (answer["continues"], answer["reports"]["step"]) == (False, [1])


def test_the_ends_of_runs_are_those_of_their_histories(registry: Registry, curves: Curves) -> None:
    assert curves.lasts() == []
    writer(registry, "calm").append(report(1), report(4), evaluation(4, 7))
    writer(registry, "begun").append(evaluation(5, None))
    lasts = {last.run: last for last in curves.lasts()}
    calm, begun = lasts["calm"], lasts["begun"]
    assert (calm.step, calm.tokens, calm.loss, calm.validation_loss) == (4, 400, 0.25, 0.5)
    assert (begun.step, begun.tokens, begun.loss, begun.validation_loss) == (5, 500, None, 0.4)
    assert calm.cursor == curves.since("calm", "")["cursor"]


@pytest.mark.parametrize("counts", ["", ".", "1", f"{'9' * 5000}.0", f"0.{'9' * 5000}", "-1.0", "٣.0", "1.0.0", "1.0 "])
def test_a_cursor_that_no_answer_had_brings_all_lines(registry: Registry, curves: Curves, counts: str) -> None:
    writer(registry, "calm").append(report(1), report(2))
    known = curves.since("calm", "")["cursor"].partition(".")[0]
    answer = curves.since("calm", f"{known}.{counts}")
    assert (answer["continues"], answer["reports"]["step"]) == (False, [1, 2])


def test_a_history_that_has_not_changed_is_not_read_again(
    registry: Registry, curves: Curves, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("calm", "at-work"):
        writer(registry, run).append(report(1))
    os.utime(run_folder(registry, "calm") / "history.jsonl", (1e9, 1e9))
    curves.lasts()
    read, whole = list[str](), registry.store.read_history

    def count(run: str, start: int = 0) -> bytes:
        read.append(run)
        return whole(run, start)

    monkeypatch.setattr(registry.store, "read_history", count)
    assert {last.run: last.step for last in curves.lasts()} == {"calm": 1, "at-work": 1}
    assert read == ["at-work"]
    writer(registry, "calm", step=1).append(report(2))
    assert curves.since("calm", "")["reports"]["step"] == [1, 2]


def test_a_run_without_a_history_is_named(registry: Registry, curves: Curves) -> None:
    writer(registry, "calm").append(report(1))
    assert len(curves.lasts()) == 1
    registry.histories.remove("calm")
    assert curves.lasts() == []
    for name in ("calm", "../../versions", ""):
        with pytest.raises(NotFound, match="There is no history of a run named"):
            curves.since(name, "")
