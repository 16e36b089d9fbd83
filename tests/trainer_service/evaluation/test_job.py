"""Evaluations with rivals, from their jobs on, without queue or worker: tiny models on a text file."""

import json
from collections.abc import Mapping

import pytest

from shared.registry.registry import Checkpoint
from tests.registries import evaluation_folder
from tests.trainer_service.site import TINY_RUN, Site
from trainer_service.evaluation.job import evaluate_version
from trainer_service.evaluation.record import Record, Standing, Verdict
from trainer_service.jobs.attempt import Stopped
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow

STEPS = {"max_steps": "40", "evaluation_interval": "20"}
# With this rate a run learns next to nothing.
SLOW = {**STEPS, "learning_rate": "0.000001"}


def run(site: Site, dataset: str = "", **values: str) -> str:
    """Trains a run and returns its label."""
    spec = site.spec(None, dataset, **values)
    assert site.train(spec)
    return f"run:{spec.run}"


def judge(site: Site, version: str, rivals: Mapping[str, str], promote: bool = False, since: float = 0.0) -> Record:
    """Evaluates a version beside its rivals and returns its record."""
    spec = EvaluateSpec(version, DatasetSpec(()), speed=False, rivals=rivals, promote=promote, since=since)
    evaluate_version(spec, site.attempt())
    event = site.all_told(Evaluation)[-1]
    assert event.version is not None
    return Record.from_json(site.registry.evaluations.read(event.version, event.method_digest))


def taught(site: Site, teacher: str, **values: str) -> str:
    """Trains a student on the site's text and returns its label."""
    request = TrainRequest(teachers=(teacher,), dataset=(site.text,), overrides=TINY_RUN | values, force=True)
    spec = request.resolve(site.registry)
    assert site.train(spec)
    return f"run:{spec.run}"


def standing(record: Record) -> Standing:
    assert record.verdict is not None
    return record.verdict


def test_only_a_better_version_becomes_the_stable_one(site: Site) -> None:
    student, control = run(site, **STEPS), run(site, **SLOW)
    best, slow = (site.registry.resolve(label).version for label in (student, control))
    record = judge(site, student, {"control": control}, promote=True)
    (rival,) = standing(record).rivals
    assert (rival.role, rival.version.number, rival.verdict) == ("control", slow, Verdict.BETTER)
    assert standing(record).promoted and site.registry.decisions.stable() == best
    assert site.told[-2] == Notice(standing(record).sentence)
    # The worse version changes nothing, and neither does a better one if nobody asks for it.
    assert not standing(judge(site, control, {"control": student}, promote=True)).promoted
    assert site.registry.decisions.stable() == best
    site.registry.decisions.set_stable(slow)
    assert standing(judge(site, student, {"control": control})).better
    assert site.registry.decisions.stable() == slow


def test_the_rivals_are_measured_on_the_held_out_text_of_the_version(site: Site) -> None:
    before = run(site, **STEPS)
    number = site.registry.resolve(before).version
    student = site.spec(resume=number, max_steps="60", validation_share="0.2")
    site.train(student)
    record = judge(
        site, f"run:{student.run}", {"before": before, "other text": run(site, site.other_text, **STEPS)}, True
    )
    same, other = standing(record).rivals
    assert same.verdict is not Verdict.NOT_COMPARED and same.method_digest == record.method.digest
    measured = Record.from_json(site.registry.evaluations.read(number, same.method_digest))
    assert measured.training is None and any("not that of the version's training" in note for note in measured.notes)
    # A tokenizer of other text divides the same text into other tokens.
    assert other.verdict is Verdict.NOT_COMPARED and "tokenizer" in other.reason
    others = Record.from_json(site.registry.evaluations.read(other.version.number, other.method_digest))
    assert others.method.text.text_bytes == record.method.text.text_bytes


def test_rivals_without_a_control_or_a_promotion_leave_the_verdict_alone(site: Site) -> None:
    student, control = run(site, **STEPS), run(site, **SLOW)
    assert judge(site, student, {"rival": control}).verdict is None
    verdict = judge(site, student, {"control": control}, promote=True).verdict
    assert verdict and verdict.promoted
    assert judge(site, student, {"rival": control}).verdict == verdict


def test_all_are_measured_in_the_smallest_context_among_them(site: Site) -> None:
    student, teacher = run(site, **STEPS), run(site, context_length="8", **STEPS)
    record = judge(site, student, {"teacher": teacher}, promote=True)
    assert record.method.window == 8 and standing(record).rivals[0].difference is not None


def test_a_student_whose_teachers_may_have_seen_the_held_out_text_is_not_promoted(site: Site) -> None:
    first = run(site, site.other_text, **STEPS)
    number = site.registry.resolve(first).version
    middle = taught(site, first, **STEPS)
    last = taught(site, middle, **STEPS)
    said = [event.text for event in site.all_told(Notice) if "held-out" in event.text]
    assert len(said) == 2 and all(f"The teacher, version {number}, was trained on other text" in each for each in said)
    # The teacher of the teacher is gone from the versions, but the run of its student keeps it.
    site.registry.remove(Checkpoint(number))
    control = taught(site, middle, **SLOW, distillation_alpha="0")
    found = standing(judge(site, last, {"control": control}, promote=True))
    assert said[0] in found.sentence and not found.promoted
    assert site.registry.decisions.stable() is None


def test_a_control_of_fewer_steps_is_not_accepted(site: Site) -> None:
    student, shorter = run(site, **STEPS), run(site, **{**SLOW, "max_steps": "20"})
    found = standing(judge(site, student, {"control": shorter}, promote=True))
    assert "is no control, because its run has 640 tokens" in found.sentence and not found.promoted
    assert site.registry.decisions.stable() is None


def test_an_interrupted_verdict_measures_only_what_is_absent(site: Site) -> None:
    student, control = run(site, **STEPS), run(site, **SLOW)
    spec = EvaluateSpec(student, DatasetSpec(()), speed=False, rivals={"control": control}, promote=True)
    number, rival = (site.registry.resolve(label).version for label in (student, control))

    def files(version: int) -> list[str]:
        return [path.read_text() for path in evaluation_folder(site.registry, version).glob("*.json")]

    with pytest.raises(Stopped):
        evaluate_version(spec, site.attempt(stop_requested=lambda: bool(files(rival))))
    (first,) = files(number)
    assert "verdict" not in json.loads(first)["measured_at"] and site.registry.decisions.stable() is None
    evaluate_version(spec, site.attempt())
    (second,) = files(number)
    times = json.loads(second)["measured_at"]
    assert times == {**json.loads(first)["measured_at"], "verdict": times["verdict"]}
    assert site.registry.decisions.stable() == number
