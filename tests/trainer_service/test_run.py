"""Runs from their jobs on, without queue or worker: a tiny model on a text file."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition, RunOwnershipLost, TrainingDiverged
from shared.gpt.tokenizer import Tokenizer
from shared.registry.decisions import BestBy
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention
from tests.fakes import publish_overflowing_version
from tests.records import write_record
from tests.registries import state_folder, version_folder
from tests.trainer_service.site import Site
from trainer_service.evaluation.job import evaluate_version
from trainer_service.jobs.attempt import Stopped
from trainer_service.jobs.events import Notice, Progress, VersionPublished
from trainer_service.jobs.requests import TrainRequest
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.run import TrainingRun
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow


def test_a_stop_while_the_data_are_prepared_leaves_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path)
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        site.train(TrainRequest().resolve(site.registry), stop_requested=lambda: next(asked))
    assert len(site.told) == 2
    assert not list(site.directories.data.rglob("*.bin")) and not site.directories.registry.exists()


def test_a_run_that_diverges_fails_and_keeps_nothing(site: Site) -> None:
    site.train(site.spec())
    version = publish_overflowing_version(site.registry, 3)
    spec = site.spec(resume=version.version, max_steps="12")
    with pytest.raises(TrainingDiverged, match="training diverged"):
        site.train(spec)
    assert site.registry.states(spec.run) == [9]  # its own copy of what it continued
    assert site.registry.versions()[-1] == version


def test_retention_follows_the_settings(site: Site) -> None:
    spec = site.spec(evaluation_interval="1")
    site.train(spec, retention=Retention(states=1, best=1, newest=2, every=4))
    numbers = [version.version for version in site.registry.versions()]
    best = site.registry.labels()["best"]
    assert set(numbers) == {4, 8, 9, best}
    kept = {version.step for version in site.registry.versions() if version.version == best}
    assert set(site.registry.states(spec.run)) == {9} | kept


def test_a_run_on_other_text_has_no_best_loss_yet(site: Site) -> None:
    site.train(site.spec())
    site.told.clear()
    site.train(site.spec(resume=3, max_steps="12"))
    assert site.all_told(Progress)[0].best_validation_loss is not None
    site.told.clear()
    site.train(site.spec(resume=3, dataset=site.other_text, max_steps="12"))
    assert site.all_told(Progress)[0].best_validation_loss is None


def test_a_vocabulary_that_the_text_does_not_fill_is_that_of_the_run_for_good(site: Site) -> None:
    spec = site.spec(vocabulary_size="5000")
    assert not site.train(spec, stop_requested=lambda: bool(site.registry.states(spec.run)))
    assert any("not 5,000" in notice.text for notice in site.all_told(Notice))
    assert site.train(spec)
    versions = site.registry.versions()
    assert [version.step for version in versions] == [3, 6, 9]
    size = Tokenizer.load(version_folder(site.registry, 3) / "tokenizer.json").vocabulary_size
    assert 257 < size < 5000
    assert {version.training["vocabulary_size"] for version in versions} == {size}
    assert {version.model["vocabulary_size"] for version in versions} == {size}
    site.told.clear()
    assert site.train(site.spec(resume=3, max_steps="12"))
    assert site.registry.version(4).training["vocabulary_size"] == size
    assert not any("vocabulary" in notice.text for notice in site.all_told(Notice))


def test_a_run_does_not_continue_with_other_text(site: Site) -> None:
    spec = site.spec()
    assert not site.train(spec, stop_requested=lambda: bool(site.registry.states(spec.run)))
    content = Path(site.text).read_text()
    site.write(Path(site.text), 500)
    with pytest.raises(FailedPrecondition, match=r"text\.txt has changed\. Put the old text back"):
        site.train(spec)
    Path(site.text).write_text(content)
    assert site.train(spec)


def test_continuing_a_version_on_changed_text_emits_a_notice(site: Site) -> None:
    site.train(site.spec())
    for change, said in ((lambda: None, 0), (lambda: site.write(Path(site.text), 500), 1)):
        change()
        site.told.clear()
        site.train(site.spec(resume=3, max_steps="12"))
        notices = [notice.text for notice in site.all_told(Notice)]
        assert (
            sum("text.txt has changed, or is read in another way, since version 3" in text for text in notices) == said
        )
    site.told.clear()
    evaluate_version(EvaluateSpec("3", DatasetSpec(()), speed=False), site.attempt())
    assert any("text.txt has changed" in notice.text for notice in site.all_told(Notice))
    site.told.clear()
    site.train(site.spec(resume=3, dataset=site.other_text, max_steps="12"))
    evaluate_version(EvaluateSpec("3", DatasetSpec((site.other_text,)), speed=False), site.attempt())
    assert not any("has changed" in notice.text for notice in site.all_told(Notice))


def test_a_new_schedule_emits_a_notice_with_its_rate(site: Site) -> None:
    site.train(site.spec())

    def told(**values: str) -> list[str]:
        site.told.clear()
        site.train(site.spec(resume=3 if values else None, **values))
        return [event.text for event in site.all_told(Notice) if "schedule" in event.text]

    (notice,) = told(max_steps="12")
    assert notice.startswith("A new schedule begins after step 9; its highest rate is ")
    (notice,) = told(max_steps="12", learning_rate="0.002")
    assert notice == "A new schedule begins after step 9; its highest rate is 2.0e-03."
    assert told() == []


def test_a_run_that_has_come_to_its_end_does_nothing_more(site: Site) -> None:
    spec = site.spec()
    assert site.train(spec)
    site.told.clear()
    assert site.train(spec)
    assert site.all_told(Progress) == [] and site.all_told(VersionPublished) == []


def test_a_run_keeps_the_version_with_the_best_evaluation_if_best_follows_evaluations(site: Site) -> None:
    site.train(site.spec())
    first = site.registry.versions()[0]
    assert site.registry.labels()["best"] != first.version
    write_record(site.registry, first, 1.5)
    sparing = Retention(states=1, best=0, newest=1, runs=0)
    site.told.clear()
    TrainingRun(site.spec(), replace(site.attempt(retention=sparing), best_by=BestBy.EVALUATION)).train()
    assert not any(published.best for published in site.all_told(VersionPublished))
    assert site.registry.versions()[0] == first
    site.train(site.spec(), retention=sparing)
    assert site.registry.versions()[0] != first


def test_a_run_that_has_begun_does_not_need_the_version_that_it_continues(site: Site) -> None:
    site.train(site.spec())
    spec = site.spec(resume=3, max_steps="12")
    asked = iter([False] * 20)
    site.train(spec, stop_requested=lambda: next(asked, True) and bool(site.registry.states(spec.run)))
    parent = site.registry.version(3)
    site.registry.remove(Checkpoint(3))
    site.registry.remove(Checkpoint(parent.step, parent.run))
    assert site.train(spec)
    assert site.registry.version(4).step == 12


def test_a_run_that_died_after_its_last_version_is_ended_by_the_next_attempt(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = site.spec()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Registry, "end_run", die)
        site.train(spec)
    assert not site.registry.has_ended(spec.run)
    assert site.train(spec)
    assert site.registry.has_ended(spec.run)
    assert len(site.registry.states(spec.run)) == 1


def test_an_earlier_attempt_cannot_take_a_run_back(site: Site) -> None:
    spec = site.spec()
    later = replace(site.attempt(), number=2)
    assert TrainingRun(spec, later).train()
    with pytest.raises(RunOwnershipLost):
        site.train(spec)


@pytest.mark.parametrize("spoil", ["tokenizer.json", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_state_that_is_damaged_costs_the_steps_since_the_one_before(site: Site, spoil: str, how: str) -> None:
    spec = site.spec()
    seen: list[int] = []

    def stop_requested() -> bool:
        seen[:] = site.registry.states(spec.run)
        return seen == [3, 6]

    assert not site.train(spec, stop_requested=stop_requested)
    newest = state_folder(site.registry, spec.run, site.registry.states(spec.run)[-1]) / spoil
    if how == "missing":
        newest.unlink()
    else:
        newest.write_bytes(newest.read_bytes()[:-7])
    assert site.train(spec)
    assert any("An older state is used, if there is one." in notice.text for notice in site.all_told(Notice))
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]
