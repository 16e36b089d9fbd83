import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.errors import FailedPrecondition, GptloopError, InvalidArgument, NotFound
from shared.registry.registry import Registry
from shared.service import cli
from tests.fakes import publish_tiny_version
from tests.registries import disk_registry
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service.commands import distill, options
from trainer_service.commands.distill import app
from trainer_service.distillation.trial import trial_of_generations
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.records import JobRecord
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import Spec, TrainSpec
from trainer_service.jobs.submit import submit


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry whose only version is hardly trained, and no Redis: nothing that is refused may reach the queue."""
    monkeypatch.setenv("GPTLOOP_VAR", str(tmp_path))
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    registry = disk_registry(tmp_path / "registry")
    publish_tiny_version(registry, 2.5)
    return registry


@pytest.mark.parametrize(
    ("words", "kind", "sentence"),
    [
        ([], InvalidArgument, "Name one kind of teacher: versions, as in `gptloop distill 3 7`, or --generations, or"),
        (["1", "--generations", "2"], InvalidArgument, "Name one kind of teacher"),
        (["1", "--stories", "bedtime"], InvalidArgument, "Name one kind of teacher"),
        (["--generations", "2", "--stories", "bedtime"], InvalidArgument, "Name one kind of teacher"),
        (["--generations", "1"], InvalidArgument, "generations is 1, but must be from 2 to 20"),
        (["--generations", "few"], InvalidArgument, "--generations is 'few', but must be a whole number"),
        (["--generations", "2", "--resume", "1"], InvalidArgument, "continues no version; leave --resume out"),
        (["newest"], InvalidArgument, "The version is 'newest', but must be a number or a label"),
        (["1 99"], NotFound, "There is no version 99"),
        (["--stories", "bedtime", "--resume", "1"], FailedPrecondition, "Version 1 has 2.50 bits per byte"),
        (["--generations", "2", "--name", "n" * 62], InvalidArgument, "but must have from 1 to 64 letters"),
        (["--generations", "2", "--set", "max_steps"], InvalidArgument, "is not of the form name=value"),
        (["--generations", "2", "--preset", "smal"], InvalidArgument, "Did you mean small?"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(
    words: list[str], kind: type[GptloopError], sentence: str
) -> None:
    with pytest.raises(kind) as refused:
        cli.invoke(app, words)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) <= 300


@pytest.mark.parametrize("name", ["distill", "evaluation", "sweep"])
def test_queueing_loads_neither_plots_nor_a_model_framework(name: str) -> None:
    code = (
        f"import sys, trainer_service.commands.{name}; sys.exit(bool({{'matplotlib', 'mlx.core'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_all_runs_of_a_trial_read_the_same_stories_while_their_set_grows(
    registry: Registry, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = options.settings().directories.data
    add_stories(data, tales(0, 5))

    def submit_and_grow(spec: Spec, *rest: Any) -> JobRecord:
        add_stories(data, tales(100, 2))
        return submit(spec, *rest)

    monkeypatch.setattr(options, "submit", submit_and_grow)
    request = TrainRequest(name="line", dataset=("builtin", "teacher:bedtime"))
    jobs = distill._enqueue(trial_of_generations(request, 3), queue, registry)
    assert [each.spec.stories for each in jobs if isinstance(each.spec, TrainSpec)] == [5, 5, 5]
