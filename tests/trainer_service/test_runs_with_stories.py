"""Runs on stories of a large teacher, from their jobs on, without queue or worker."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, NotFound
from shared.gpt.weights import load_arrays
from shared.version_format import MODEL_FILE, OPTIMIZER_FILE
from tests.registries import state_folder
from tests.trainer_service.site import TINY_RUN, Site
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service.distillation.readiness import MOST_BITS_PER_BYTE
from trainer_service.evaluation.job import evaluate_version
from trainer_service.jobs.events import Evaluation, Notice, Progress
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec, TrainSpec
from trainer_service.run import prepare_data
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow

BEDTIME = "teacher:bedtime"
STORIES = tales(0, 40)


@pytest.fixture
def taught(site: Site) -> Site:
    """A site with a set of stories."""
    add_stories(site.directories.data, STORIES)
    return site


def spec(site: Site, *names: str, resume: int | None = None, **values: str) -> TrainSpec:
    overrides = values if resume is not None else TINY_RUN | values
    return TrainRequest(dataset=names, resume=resume, overrides=overrides).resolve(site.registry)


def stop_after_a_state(site: Site, job: TrainSpec) -> None:
    assert not site.train(job, stop_requested=lambda: bool(site.registry.states(job.run)))


def last_state(site: Site, job: TrainSpec) -> dict[str, object]:
    folder = state_folder(site.registry, job.run, site.registry.states(job.run)[-1])
    arrays = load_arrays(folder / MODEL_FILE) | load_arrays(folder / OPTIMIZER_FILE)
    return {name: array.tolist() for name, array in arrays.items()}


def notices(site: Site) -> list[str]:
    return [event.text for event in site.all_told(Notice)]


def test_a_run_on_builtin_and_stories_learns_from_both_and_resumes_exactly(taught: Site) -> None:
    whole, stopped = (
        spec(taught, "builtin", BEDTIME, teacher_prompts="true", max_train_tokens="5000") for _ in range(2)
    )
    assert taught.train(whole)
    assert any(text.startswith(f"All 40 stories of {BEDTIME} are used.") for text in notices(taught))
    stop_after_a_state(taught, stopped)
    # What the ledger gains meanwhile is not for this run.
    add_stories(taught.directories.data, tales(100, 10))
    assert taught.train(stopped)
    assert any("has grown since the run was queued; the run reads the first 40 stories" in t for t in notices(taught))
    assert last_state(taught, stopped) == last_state(taught, whole)
    plain = spec(taught, "builtin", max_train_tokens="5000")
    assert taught.train(plain)
    assert last_state(taught, plain) != last_state(taught, whole)
    version = taught.registry.versions()[0]
    assert version.dataset_files == ("builtin", BEDTIME) and version.dataset == f"builtin, {BEDTIME}"
    # The held-out text is the other text's, so versions with and without stories compare.
    assert len({each.evaluation_set for each in taught.registry.versions()}) == 1


def test_runs_that_were_queued_together_read_the_same_stories_although_their_set_grows_between_them(
    taught: Site,
) -> None:
    first, second = (replace(spec(taught, taught.text, BEDTIME, max_steps="3"), stories=40) for _ in range(2))
    assert taught.train(first)
    add_stories(taught.directories.data, tales(100, 10))
    assert taught.train(second)
    assert last_state(taught, first) == last_state(taught, second)
    assert len({each.dataset_revision for each in taught.registry.versions()}) == 1


def test_a_run_does_not_go_on_without_the_stories_that_it_began_with(taught: Site) -> None:
    job = spec(taught, taught.text, BEDTIME)
    stop_after_a_state(taught, job)
    ledger = taught.directories.data / "stories" / "bedtime" / "ledger.jsonl"
    rows = ledger.read_text()
    ledger.write_text(rows.replace(STORIES[2], f"{STORIES[2]} And so on."))
    with pytest.raises(FailedPrecondition, match=r"text\.txt, teacher:bedtime has changed\. Put the old text back"):
        taught.train(job)
    ledger.write_text("\n".join(rows.splitlines()[:20]) + "\n")
    with pytest.raises(FailedPrecondition, match="has changed"):
        taught.train(job)
    ledger.unlink()
    with pytest.raises(NotFound, match="no set of stories 'bedtime'"):
        taught.train(job)
    ledger.write_text(rows)
    assert taught.train(job)


def test_a_run_on_stories_alone_goes_on_with_those_that_it_began_with(taught: Site) -> None:
    job = spec(taught, BEDTIME, evaluate_every="1")
    stop_after_a_state(taught, job)
    add_stories(taught.directories.data, tales(100, 10))
    assert taught.train(job)
    assert len({each.evaluation_set for each in taught.registry.versions()}) == 1
    assert not any("has changed" in text for text in notices(taught))


def test_a_version_is_continued_with_its_stories_and_a_set_that_has_grown_is_noticed(taught: Site) -> None:
    taught.train(spec(taught, taught.text, BEDTIME))
    for added in (0, 1):
        add_stories(taught.directories.data, tales(200, added))
        taught.told.clear()
        job = spec(taught, resume=3, max_steps="12")
        assert job.data.dataset == (taught.text, BEDTIME)
        assert taught.train(job)
        assert (
            sum("has changed, or is read in another way, since version 3" in each for each in notices(taught)) == added
        )
        assert taught.all_told(Progress)[0].best_validation_loss is not None


def test_a_version_with_stories_is_evaluated_on_the_text_of_one_without_them(taught: Site) -> None:
    taught.train(spec(taught, taught.text, BEDTIME, max_steps="3"))
    taught.train(spec(taught, taught.text, max_steps="3"))
    add_stories(taught.directories.data, tales(100, 3))
    for version in ("1", "2"):
        evaluate_version(EvaluateSpec(version, DatasetSpec(()), speed=False), taught.attempt())
    # Even if the set is gone.
    (taught.directories.data / "stories" / "bedtime" / "ledger.jsonl").unlink()
    evaluate_version(EvaluateSpec("2", DatasetSpec((taught.text, BEDTIME)), speed=False), taught.attempt())
    methods = [event.method_digest for event in taught.all_told(Evaluation) if event.method_digest]
    assert len(methods) == 3 and len(set(methods)) == 1
    assert not any("has changed" in text or "not that of the version's training" in text for text in notices(taught))
    taught.write(Path(taught.text), 500)
    evaluate_version(EvaluateSpec("1", DatasetSpec(()), speed=False), taught.attempt())
    assert any("text.txt has changed" in text for text in notices(taught))


def test_a_version_that_is_hardly_trained_is_not_given_stories(taught: Site) -> None:
    taught.train(spec(taught, taught.text))
    assert taught.registry.version(3).bits_per_byte > MOST_BITS_PER_BYTE
    request = TrainRequest(dataset=(taught.text, BEDTIME), resume=3, overrides={"max_steps": "12"})
    with pytest.raises(FailedPrecondition, match=r"Version 3 has .* bits per byte"):
        request.resolve(taught.registry)
    assert replace(request, force=True).resolve(taught.registry).force


def test_a_teacher_that_read_stories_among_the_same_text_has_not_seen_other_text(taught: Site) -> None:
    taught.train(spec(taught, taught.text, BEDTIME))
    add_stories(taught.directories.data, tales(100, 20), "noon")
    for dataset, said in (((taught.text,), 0), ((taught.text, "teacher:noon"), 0), ((taught.other_text,), 1)):
        taught.told.clear()
        request = TrainRequest(teachers=("3",), dataset=dataset, overrides={"max_steps": "3"}, force=True)
        taught.train(request.resolve(taught.registry))
        assert sum("trained on other text" in text for text in notices(taught)) == said


def test_preparing_a_run_prepares_its_stories(taught: Site) -> None:
    job = spec(taught, taught.text, BEDTIME)
    first = prepare_data(job, taught.attempt())
    files = {path: path.stat().st_mtime_ns for path in Path(taught.directories.data).rglob("*.bin")}
    assert first.teacher is not None and any(path.name == "teacher.bin" for path in files)
    assert taught.train(job)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    state = state_folder(taught.registry, job.run, 9)
    assert json.loads((state / "text.json").read_text()) == {"revision": first.revision, "stories": 40}
