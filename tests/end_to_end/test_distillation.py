"""Distillations as a person starts them: real commands, a real Redis and a real worker."""

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from shared.pb.training.v1 import training_pb2
from tests.end_to_end.conftest import TINY, System
from tests.trainer_service.story_sets import add_stories, tales
from tests.workplace import Workplace
from trainer_service.jobs.requests import TrainRequest
from trainer_service.text.stories import train_stories

pytestmark = pytest.mark.slow

SHORT = {**TINY, "max_steps": "20", "evaluation_interval": "10"}
SMALL = " ".join(f"{name}={value}" for name, value in SHORT.items())


@pytest.fixture(scope="module")
def workplace(system: System, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A checkout with some stories, beside a system with a first version on them, which is hardly trained."""
    workplace = Workplace(tmp_path_factory.mktemp("a folder"), system.environment)
    text = workplace.folder / "stories.txt"
    text.write_text("<|endoftext|>".join(islice(train_stories(), 400)))
    request = TrainRequest(dataset=(str(text),), overrides={**SHORT, "max_steps": "10"})
    system.finish(system.trainer.submit(request).job.id)
    return workplace


def jobs(system: System) -> set[str]:
    return {job.id for job in system.queue.store.jobs()}


def result(printed: str) -> dict[str, Any]:
    """Returns the JSON of the last line, after a look at the files that the lines before it name."""
    *_, markdown, html, last = printed.splitlines()
    assert "## Verdict on version" in Path(markdown).read_text() and "Verdict on version" in Path(html).read_text()
    return dict(json.loads(last))


def test_a_hardly_trained_teacher_is_refused_and_nothing_is_queued(system: System, workplace: Workplace) -> None:
    before = jobs(system)
    error = workplace.refusal("distill", "TEACHER=1")
    assert re.match(r"error: Version 1 has \d\.\d\d bits per byte, but .*\(FORCE=1\)\.$", error)
    assert jobs(system) == before


def test_a_student_is_judged_beside_its_control_and_promoted_only_if_it_is_better(
    system: System, workplace: Workplace
) -> None:
    ended = workplace.make("distill", "TEACHER=1", "FORCE=1", "PROMOTE=1", "NAME=wide", "SET=max_steps=20")
    assert ended.returncode == 0, ended
    runs = {version.run: version for version in system.registry.versions()}
    student, control = runs["wide"], runs["wide-control"]
    assert [each.version for each in student.teachers] == [1] and control.teachers == ()
    assert student.tokenizer_digest == control.tokenizer_digest == system.registry.version(1).tokenizer_digest
    found = result(ended.stdout)
    (verdict,) = (each["verdict"] for each in found["versions"] if each["verdict"])
    assert [each["role"] for each in verdict["rivals"]] == ["control", "teacher 1"]
    assert all(each["verdict"] in ("better", "worse", "cannot be told") for each in verdict["rivals"])
    assert verdict["promoted"] == verdict["better"] == all(each["verdict"] == "better" for each in verdict["rivals"])
    stable = system.registry.decisions.stable()
    assert (stable is not None) == verdict["promoted"]
    assert f"note: {verdict['sentence']}" in ended.stdout and "Verdict on version" in ended.stdout
    # The same report comes again, and nothing is measured for it.
    again = workplace.run(".venv/bin/gptloop", "eval", "--no-speed", "run:wide-control", "1", "run:wide")
    assert result(again.stdout)["versions"] == found["versions"]


def test_each_generation_of_a_chain_learns_from_the_one_before_it(system: System, workplace: Workplace) -> None:
    ended = workplace.make("distill", "GENERATIONS=2", "FORCE=1", "NAME=line", "DATASET=stories.txt", f"SET={SMALL}")
    assert ended.returncode == 0, ended
    first, second = (system.registry.resolve(f"run:line-g{number}") for number in (1, 2))
    assert (first.teachers, [each.version for each in second.teachers]) == ((), [first.version])
    assert [each.training["seed"] for each in (first, second)] == [1337, 1338]
    (verdict,) = (each["verdict"] for each in result(ended.stdout)["versions"] if each["verdict"])
    assert [(each["role"], each["version"]["number"]) for each in verdict["rivals"]] == [("control", first.version)]


def test_a_version_is_taught_by_stories_and_judged_beside_what_it_was(system: System, workplace: Workplace) -> None:
    add_stories(system.directories.data, tales(0, 40))
    ended = workplace.make("distill", "STORIES=bedtime", "RESUME=1", "FORCE=1", "NAME=told")
    assert ended.returncode == 0, ended
    student, control = (system.registry.resolve(f"run:{name}") for name in ("told", "told-control"))
    text = str(workplace.folder / "stories.txt")
    assert (student.dataset_files, control.dataset_files) == (("teacher:bedtime", text), (text,))
    # As many steps again as version 1 had.
    assert {each.training["max_steps"] for each in (student, control)} == {20}
    (verdict,) = (each["verdict"] for each in result(ended.stdout)["versions"] if each["verdict"])
    assert [(each["role"], each["version"]["number"]) for each in verdict["rivals"]] == [
        ("control", control.version),
        ("before", 1),
    ]
    assert all(each["difference"] is not None for each in verdict["rivals"])


def test_without_following_the_jobs_wait_for_each_other(system: System, workplace: Workplace) -> None:
    ended = workplace.make("distill", "GENERATIONS=3", "FORCE=1", "NAME=long", f"SET={SMALL}", "FOLLOW=0")
    assert ended.returncode == 0, ended
    ids = re.findall(r"^job ([0-9a-f]{8}) queued: (?:train long-g\d|evaluate version run:long-g3)$", ended.stdout, re.M)
    assert len(ids) == 4 and ended.stdout.endswith(f"gptloop watch {ids[-1]}\n")
    found = [system.queue.store.get(job) for job in ids]
    assert [each.after for each in found] == [(), (ids[0],), (ids[1],), (ids[0], ids[1], ids[2])]
    system.queue.cancel(ids[0])
    assert all(system.end(job).state for job in ids)


def test_a_trial_that_cannot_be_queued_as_a_whole_leaves_nothing(system: System, workplace: Workplace) -> None:
    taken = system.trainer.submit(TrainRequest(name="odd-g2", overrides={**SHORT, "max_steps": "100000"})).job.id
    before = jobs(system)
    error = workplace.refusal("distill", "GENERATIONS=2", "FORCE=1", "NAME=odd", f"SET={SMALL}")
    assert "a run named 'odd-g2' already" in error
    (first,) = jobs(system) - before
    assert system.end(first).state == training_pb2.JOB_STATE_CANCELLED
    system.queue.cancel(taken)
