import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import AlreadyExists, InvalidArgument, NotFound
from tests.events import PROGRESS
from tests.jobs import report, start, training
from tests.registries import disk_registry
from tests.shared.registry.scenarios import publish
from trainer_service.jobs.events import Evaluation
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.specs import Kind
from trainer_service.listings import print_runs
from trainer_service.runs import Run, all_runs, chosen, differing


def found(queue: JobQueue, tmp_path: Path) -> list[Run]:
    return all_runs(queue.store.jobs(kinds=[Kind.TRAIN]), disk_registry(tmp_path / "registry"))


def test_runs_are_listed_with_their_best_loss_and_the_values_in_which_they_differ(
    queue: JobQueue, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    narrow = queue.enqueue(training(tmp_path, name="narrow", notes="the base")).id
    queue.enqueue(training(tmp_path, name="wide", width="320", seed="7"))
    start(queue, narrow)
    report(queue, narrow, replace(PROGRESS, step=40), Evaluation(10, 1.9, 2.0, 0.5), Evaluation(20, 1.5, 2.5, 0.7))
    runs = found(queue, tmp_path)
    assert [(run.name, run.state, run.steps) for run in runs] == [("wide", "queued", 0), ("narrow", "running", 40)]
    assert [(run.validation_loss, run.bits_per_byte) for run in runs] == [(None, None), (2.0, 0.5)]
    assert differing(runs) == ["width", "seed"] and differing(runs[:1]) == []
    print_runs(runs, False)
    heading, wide, base = capsys.readouterr().out.splitlines()
    assert "width" in heading and "seed" in heading and "batch_size" not in heading
    assert "320" in wide and "160" in base and "2.0000" in base and "the base" in base
    print_runs(chosen(runs, ["narrow"]), True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["job"], row["values"]["width"], row["notes"]) == ("narrow", narrow, 160, "the base")
    with pytest.raises(NotFound, match="no run named 'x'"):
        chosen(runs, ["x"])


def test_a_run_whose_job_is_forgotten_is_known_from_its_versions(queue: JobQueue, tmp_path: Path) -> None:
    registry = disk_registry(tmp_path / "registry")
    publish(registry, run="old", step=10, validation_loss=2.0, bits_per_byte=0.5, notes="kept")
    publish(registry, run="old", step=20, validation_loss=3.0, bits_per_byte=0.9, notes="kept")
    (run,) = found(queue, tmp_path)
    assert (run.name, run.job, run.state, run.steps, run.validation_loss) == ("old", None, None, 20, 2.0)
    assert run.notes == "kept" and run.values["preset"] == "demo"


def test_a_name_is_given_once_in_a_registry(queue: JobQueue, tmp_path: Path) -> None:
    wide = training(tmp_path, name="wide")
    job = queue.enqueue(wide).id
    with pytest.raises(AlreadyExists, match=f"The job {job} has a run named 'wide' already"):
        queue.enqueue(wide)
    # A job that ended before its run began leaves the name.
    queue.cancel(job)
    queue.enqueue(wide)
    publish(disk_registry(tmp_path / "registry"), run="old")
    with pytest.raises(AlreadyExists, match="The registry has a run named 'old' already"):
        training(tmp_path, name="old")


@pytest.mark.parametrize("name", ["../up", "a b", "-x", ".hidden", "a/b", "ü", "x" * 65, "a\n", "a\udce9"])
def test_a_name_that_is_not_a_portable_folder_name_is_rejected(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="letters, digits, dots") as refused:
        training(tmp_path, name=name)
    assert len(str(refused.value)) <= 300
