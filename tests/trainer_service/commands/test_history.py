import csv
import io
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shared.errors import InvalidArgument, NotFound
from shared.registry.history import EvaluationLine, ReportLine
from shared.registry.registry import Registry
from shared.service.settings import Directories
from tests.registries import disk_registry, root_of
from trainer_service.commands.history import app


def write(registry: Registry, run: str, reports: int, interval: int) -> None:
    """Writes a history with a report every ten steps, and an evaluation and a version every `interval` steps."""
    writer = registry.histories.writer(registry.take_over(run), 0)
    for step in range(10, 10 * reports + 1, 10):
        loss = 5 / step**0.5
        writer.append(
            ReportLine(step, 100 * step, loss, 1e-3, 0.5, 1234.5, 2**20, 2**21, 2**22, time=1.7e9 + step, attempt=1)
        )
        if step % interval == 0:
            writer.append(EvaluationLine(step, 100 * step, loss + 0.1, loss, step // interval, 1.7e9 + step, 1))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = disk_registry(Directories(tmp_path).registry)
    write(registry, "wide", reports=6, interval=30)
    write(registry, "long", reports=500, interval=100)
    write(registry, "unevaluated", reports=100, interval=10_000)
    return registry


def run(registry: Registry, *arguments: str) -> Result:
    environment = {"GPTLOOP_VAR": str(root_of(registry).parent), "COLUMNS": "80"}
    return CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)


def test_a_short_history_is_one_table(registry: Registry) -> None:
    heading, *lines = run(registry, "wide").output.splitlines()
    assert re.split(" {2,}", heading.strip())[:4] == ["step", "tokens", "training loss", "held-out loss"]
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40", "50", "60"]
    assert lines[2].split()[2:6] == ["0.9129", "1.0129", "0.9129", "1"] and lines[2].split()[-3:] == ["20", "s", "1"]
    assert "held-out" not in lines[0] and len(lines[0].split()) == len(lines[2].split()) - 3


@pytest.mark.parametrize(("name", "evaluated"), [("long", 18), ("unevaluated", 0)])
def test_a_long_history_becomes_twenty_rows_with_the_first_and_the_last(
    registry: Registry, name: str, evaluated: int
) -> None:
    history = registry.histories.read(name)
    _, *lines, note = run(registry, name).output.splitlines()
    assert len(lines) == 20
    steps = [int(line.split()[0].replace(",", "")) for line in lines]
    assert steps == sorted(steps) and steps[0] == 10 and steps[-1] == history.reports[-1].step
    assert len({each.step for each in history.evaluations} & set(steps)) >= evaluated
    assert note == f"20 of {len(history.reports)} rows; `gptloop history {name} --csv` prints all."


def test_csv_and_json_have_every_row_with_every_value(registry: Registry) -> None:
    history = registry.histories.read("long")
    rows = list(csv.DictReader(io.StringIO(run(registry, "long", "--csv").output)))
    assert [int(row["step"]) for row in rows] == [line.step for line in history.reports]
    assert [float(row["loss"]) for row in rows] == [line.loss for line in history.reports]
    assert [float(row["time"]) for row in rows] == [line.time for line in history.reports]
    evaluated = [row for row in rows if row["validation_loss"]]
    assert [int(row["version"]) for row in evaluated] == [line.version for line in history.evaluations]
    found = json.loads(run(registry, "long", "--json").output)
    assert [row["step"] for row in found] == [line.step for line in history.reports]
    assert set(found[0]) == set(rows[0]) and found[0]["version"] is None
    assert [{name: str(value) for name, value in row.items() if value is not None} for row in found] == [
        {name: value for name, value in row.items() if value} for row in rows
    ]


def test_an_evaluation_without_a_report_has_a_row(registry: Registry) -> None:
    writer = registry.histories.writer(registry.take_over("lost"), 0)
    writer.append(EvaluationLine(10, 100, 2.0, 1.0, None, 1.7e9, 1))
    (row,) = json.loads(run(registry, "lost", "--json").output)
    assert (row["step"], row["validation_loss"], row["loss"], row["version"]) == (10, 2.0, None, None)
    assert "2.0000" in run(registry, "lost").output


def test_the_event_file_of_tensorboard_has_every_value_and_replaces_the_one_before(
    registry: Registry, tmp_path: Path
) -> None:
    boards = tmp_path / "bo:ards"
    (boards / "wide").mkdir(parents=True)
    (boards / "wide" / "events.out.tfevents.0.other").touch()
    (boards / "wide" / "events.out.tfevents.0.host.gptloop").touch()
    output = run(registry, "wide", "--tensorboard", str(boards)).output
    assert output.startswith(f"8 reports and evaluations are in {boards / 'wide'}: ")
    other, written = sorted((boards / "wide").iterdir(), key=lambda path: path.suffix == ".gptloop")
    assert other.name.endswith(".other") and written.name.endswith(".gptloop")
    history = registry.histories.read("wide")
    found = values(written)
    for tag, name, lines in (
        ("loss/training", "loss", history.reports),
        ("loss/held_out", "validation_loss", history.evaluations),
        ("memory/peak_bytes", "peak_memory_bytes", history.reports),
    ):
        expected = [(line.step, line.time, pytest.approx(getattr(line, name))) for line in lines]
        assert found[tag] == expected
    assert set(found) == {
        *("loss/training", "loss/held_out", "loss/bits_per_byte", "optimizer/learning_rate", "optimizer/gradient_norm"),
        *("speed/tokens_per_second", "memory/active_bytes", "memory/peak_bytes", "memory/resident_bytes"),
    }


def values(path: Path) -> dict[str, list[tuple[int, float, object]]]:
    """Reads an event file: records of 8 bytes of length and 4 of checksum, the event, and 4 of checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float, object]]] = {}
    content = path.read_bytes()
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, event.wall_time, value.simple_value))
    return found


def test_a_folder_that_cannot_be_written_is_an_error(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        run(registry, "wide", "--tensorboard", str(tmp_path / "file"))


def test_an_unknown_run_and_two_forms_at_once_are_errors(registry: Registry) -> None:
    with pytest.raises(NotFound, match=r"named 'wid'; these runs have one: long, unevaluated, wide\."):
        run(registry, "wid")
    with pytest.raises(InvalidArgument, match="Give only one of --csv, --json and --tensorboard"):
        run(registry, "wide", "--csv", "--json")
