import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import FailedPrecondition, NotFound, RunOwnershipLost
from shared.registry.history import EvaluationLine, HistoryWriter, Line, ReportLine
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention, prune
from tests.registries import disk_registry, run_folder, version_folder
from tests.shared.registry.scenarios import RUN, make_line, publish, write_state


def report(step: int, attempt: int = 1) -> ReportLine:
    return ReportLine(
        step=step,
        tokens=100 * step,
        loss=1 / step,
        learning_rate=1e-3,
        gradient_norm=0.1,
        tokens_per_second=1e6 / 3,
        active_memory_bytes=2**40,
        peak_memory_bytes=2**41,
        resident_memory_bytes=0,
        time=1.7e9 + step,
        attempt=attempt,
    )


# Evaluated every second step; a version each time.
LINES: tuple[Line, ...] = tuple(
    line for step in (2, 4, 6) for line in (report(step - 1), report(step), make_line(step, step // 2))
)
STEPS = st.integers(0, 6)


def begin(registry: Registry, step: int = 0, published: EvaluationLine | None = None) -> HistoryWriter:
    return registry.histories.writer(registry.take_over(RUN), step, published)


def read(registry: Registry) -> tuple[Line, ...]:
    history = registry.histories.read(RUN)
    return tuple(
        sorted((*history.reports, *history.evaluations), key=lambda line: (line.step, isinstance(line, EvaluationLine)))
    )


@pytest.fixture
def path(registry: Registry) -> Path:
    begin(registry).append(*LINES)
    return run_folder(registry, RUN) / "history.jsonl"


def test_a_history_is_read_as_it_was_written(registry: Registry, path: Path) -> None:
    assert list(registry.histories.ages_s()) == [RUN] and read(registry) == LINES
    history = registry.histories.read(RUN)
    assert [line.step for line in history.reports] == [1, 2, 3, 4, 5, 6]
    assert [line.version for line in history.evaluations] == [1, 2, 3]
    assert len(path.read_text().splitlines()) == len(LINES)


@given(killed_at=st.floats(0, 1), step=STEPS, has_version=st.booleans())
def test_a_run_that_was_killed_at_any_byte_continues_after_the_step_of_its_state(
    tmp_path_factory: pytest.TempPathFactory, killed_at: float, step: int, has_version: bool
) -> None:
    registry = disk_registry(tmp_path_factory.mktemp("history"))
    begin(registry).append(*LINES)
    path = run_folder(registry, RUN) / "history.jsonl"
    whole = path.read_bytes()
    left = whole[: round(killed_at * len(whole))]
    path.write_bytes(left)
    count = left.count(b"\n")
    assert read(registry) == LINES[:count]

    published = make_line(step, step // 2) if has_version and step and step % 2 == 0 else None
    # The evaluation of the step itself takes place again, unless its version is there.
    before = [
        line for line in LINES[:count] if line.step < step or (line.step == step and isinstance(line, ReportLine))
    ]
    expected = (*before, *([published] if published else []))
    writer = begin(registry, step, published)
    writer.append()
    assert read(registry) == expected
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    writer.append(report(7, attempt=2))
    assert read(registry) == (*expected, report(7, attempt=2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "null",
        "[1]",
        "\0" * 40,
        "é" * 10,
        '{"kind": "report", "step": 1}',
        '{"kind": "other", "step": 1}',
        '{"kind": ["report"]}',
        "[" * 100_000,
        '{"kind": "evaluation", "step": 1.5, "tokens": 1, "validation_loss": 1, "bits_per_byte": 1, "version": null, '
        '"time": 1, "attempt": 1}',
        '{"kind": "evaluation", "step": 1, "tokens": 1, "validation_loss": NaN, "bits_per_byte": 1, "version": null, '
        '"time": 1, "attempt": 1}',
        '{"kind": "evaluation", "step": true, "tokens": 1, "validation_loss": 1, "bits_per_byte": 1, "version": null, '
        '"time": 1, "attempt": 1}',
        '{"kind": "evaluation", "step": 1, "tokens": 1, "validation_loss": 1' + "0" * 400 + ', "bits_per_byte": 1, '
        '"version": null, "time": 1, "attempt": 1}',
    ],
)
def test_a_line_that_cannot_be_read_is_ignored(registry: Registry, path: Path, text: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join((*lines[:4], text + "\n", *lines[4:])))
    assert read(registry) == LINES
    begin(registry, 5).append(report(6))
    assert read(registry) == (*LINES[:7], report(6))


def test_a_line_of_a_newer_program_may_have_more_values(registry: Registry, path: Path) -> None:
    path.write_text(path.read_text().replace("{", '{"more": [1], '))
    assert read(registry) == LINES


def test_an_evaluation_that_is_missing_for_a_published_version_is_added_once(registry: Registry) -> None:
    begin(registry).append(report(1), report(2))
    for _ in range(2):
        begin(registry, 2, make_line(2, 1)).append()
        assert read(registry) == (report(1), report(2), make_line(2, 1))
    # Its version was removed, and another one published.
    begin(registry, 2, make_line(2, 5)).append()
    assert read(registry) == (report(1), report(2), make_line(2, 5))


def test_only_the_owner_of_the_run_writes(registry: Registry, path: Path) -> None:
    first = begin(registry, 6, make_line(6, 3))
    begin(registry, 4, make_line(4, 2)).append(report(5, attempt=2))
    expected = read(registry)
    with pytest.raises(RunOwnershipLost, match="Another process took over the run"):
        first.append(report(7))
    assert read(registry) == expected == (*LINES[:6], report(5, attempt=2))


def test_a_write_that_fails_halfway_costs_only_its_line(registry: Registry) -> None:
    writer = begin(registry)
    writer.append(report(1))
    path = run_folder(registry, RUN) / "history.jsonl"
    with largest_file(path.stat().st_size + 20):
        for step in (2, 3):
            with pytest.raises(FailedPrecondition, match=r"The registry .* cannot be written: "):
                writer.append(report(step))
    assert path.stat().st_size - len(path.read_text().splitlines()[0]) == 21
    assert read(registry) == (report(1),)
    writer.append(report(4), make_line(4))
    assert read(registry) == (report(1), report(4), make_line(4))


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Limits the size of files, so that a write beyond it is cut off, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_line_follows_lines_that_could_not_be_removed(
    registry: Registry, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, content = begin(registry, 2), path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(FailedPrecondition, match=r"cannot be written: No space left .*; free space on its disk"):
            writer.append(report(3, attempt=2))
    assert path.read_bytes() == content
    writer.append(report(4, attempt=2))
    assert read(registry) == (*LINES[:2], report(4, attempt=2))


def refuse(path: Path, mode: str = "r", *_: object, **__: object) -> object:
    if mode in ("r+b", "a+b"):
        raise OSError(28, "No space left on device", str(path))
    return open(path, mode)  # noqa: PTH123


def test_an_unknown_run_is_an_error_that_names_the_others(registry: Registry) -> None:
    with pytest.raises(NotFound, match=r"There is no history of a run named 'wide'; no run has one yet\."):
        registry.histories.read("wide")
    begin(registry).append(report(1))
    registry.take_over("wide")
    for name in ("wide", "../runs/run-1", ""):
        with pytest.raises(NotFound, match=r"; these runs have one: run-1\."):
            registry.histories.read(name)


def test_a_history_goes_once_its_run_has_neither_state_nor_version(registry: Registry) -> None:
    def pruned() -> list[str]:
        prune(registry, Retention(runs=0, newest=1, best=0))
        return list(registry.histories.ages_s())

    for run in (RUN, "begun"):
        registry.histories.writer(registry.take_over(run), 0).append(report(1))
    os.utime(run_folder(registry, RUN) / "history.jsonl", (0, 0))
    state, version = write_state(registry), publish(registry)
    assert pruned() == ["begun", RUN]
    registry.remove(Checkpoint(int(state.name), RUN))
    assert pruned() == ["begun", RUN]
    registry.remove(Checkpoint(version.version))
    # A run that has just begun has no state yet.
    assert pruned() == ["begun"]
    os.utime(run_folder(registry, "begun") / "history.jsonl", (0, 0))
    assert pruned() == []


def test_no_history_goes_while_a_version_cannot_be_read(registry: Registry) -> None:
    begin(registry).append(report(1))
    os.utime(run_folder(registry, RUN) / "history.jsonl", (0, 0))
    version = publish(registry)
    (version_folder(registry, version.version) / "manifest.json").write_text("{}")
    prune(registry, Retention())
    assert list(registry.histories.ages_s()) == [RUN]


@given(appended=st.lists(st.tuples(STEPS, st.integers(0, len(LINES)), st.floats(0, 1))))
def test_a_reader_knows_what_the_history_holds_after_each_read_whatever_was_cut_and_written_between(
    tmp_path_factory: pytest.TempPathFactory, appended: list[tuple[int, int, float]]
) -> None:
    registry = disk_registry(tmp_path_factory.mktemp("history"))
    begin(registry).append(*LINES)
    path, reader = run_folder(registry, RUN) / "history.jsonl", registry.histories.reader(RUN)
    known, is_cut = reader.read()
    assert (tuple(known), is_cut) == (LINES, False)
    for attempt, (step, count, torn) in enumerate(appended, start=2):
        lines = [replace(line, attempt=attempt) for line in LINES if line.step > step][:count]
        begin(registry, step).append(*lines)
        # A killed process may have left the beginning of a line.
        path.write_bytes(path.read_bytes() + b'{"kind": "report", "step": 7'[: round(28 * torn)])
        new, is_cut = reader.read()
        known = new if is_cut else known + new
        assert tuple(known) == read(registry)
        assert reader.read() == ([], False)


def test_a_reader_reads_each_line_once(registry: Registry) -> None:
    writer, reader = begin(registry), registry.histories.reader(RUN)
    for lines in (LINES[:4], LINES[4:5], (), LINES[5:]):
        writer.append(*lines)
        assert reader.read() == (list(lines), False)
    registry.histories.remove(RUN)
    with pytest.raises(FileNotFoundError):
        reader.read()


def test_a_line_with_a_number_that_is_too_large_is_ignored(registry: Registry, path: Path) -> None:
    path.write_text(path.read_text().replace('"tokens": 100,', f'"tokens": {2**63},'))
    assert read(registry) == LINES[1:]
