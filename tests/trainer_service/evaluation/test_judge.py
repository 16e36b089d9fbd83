"""Evaluations from their jobs on, without queue or worker: a tiny model on a text file."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import DataError, InvalidArgument, NotFound
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint
from shared.version_format import read_tokenizer
from tests.registries import evaluation_folder, version_folder
from tests.trainer_service.site import Site
from trainer_service.evaluation.job import evaluate_version
from trainer_service.evaluation.judge import Judge
from trainer_service.evaluation.record import Record, Speed
from trainer_service.evaluation.texts import Texts, read_texts
from trainer_service.jobs.attempt import Stopped, preparation_report
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.corpus import DatasetSpec
from trainer_service.training.workers import Workers

pytestmark = pytest.mark.slow

OWN = DatasetSpec(())


def texts_of(site: Site, version: VersionManifest, data: DatasetSpec = OWN) -> Texts:
    tokenizer = read_tokenizer(version_folder(site.registry, version.version))
    return read_texts(version, data, tokenizer, site.directories.data, lambda *_: None)


def quality(
    site: Site,
    version: int,
    data: DatasetSpec = OWN,
    stop_requested: Callable[[], bool] = lambda: False,
    since: float = 0.0,
    window: int = 0,
) -> Record:
    """Measures a version as a job does, without speed and memory, which no two evaluations have in common."""
    manifest = site.registry.version(version)
    attempt = site.attempt(stop_requested)
    with Workers(1) as workers:
        judge = Judge(site.registry, attempt.device, workers, preparation_report(attempt))
        return judge.quality(manifest, texts_of(site, manifest, data), window, since)


def timeless(record: Record) -> Record:
    return replace(record, measured_at={})


def kept(site: Site, version: int) -> list[Record]:
    folder = evaluation_folder(site.registry, version)
    return [Record.from_json(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_job_fills_every_section_of_a_record_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTLOOP_VAR", str(site.directories.var))  # for the processes that measure speed
    site.train(site.spec())
    best = site.registry.resolve("best")
    site.told.clear()
    evaluate_version(EvaluateSpec("best", OWN), site.attempt())
    (record,) = kept(site, best.version)
    assert record.text and record.training and record.writing and record.speed and record.memory
    assert set(record.measured_at) == {"text", "training", "writing", "speed"}
    assert record.method.text.tokens == sum(record.text.unit_tokens) > 4 * 16  # more than training looks at
    assert record.text.perplexity == pytest.approx(math.exp(record.text.nats_per_token))
    assert abs(record.text.nats_per_token - best.validation_loss) < 0.5
    assert len(record.writing.continuations) == record.writing.model.texts
    (event,) = site.all_told(Evaluation)
    assert (event.version, event.step, event.training_loss) == (best.version, best.step, None)
    assert (event.text, event.method_digest) == ("text.txt", record.method.digest)
    assert event.validation_loss == record.text.nats_per_token
    # A second evaluation measures nothing, unless it is asked to.
    evaluate_version(EvaluateSpec("best", OWN), site.attempt())
    assert kept(site, best.version) == [record] and site.all_told(Evaluation) == [event, event]
    evaluate_version(EvaluateSpec("best", OWN, since=max(record.measured_at.values()) + 1e-6), site.attempt())
    (again,) = kept(site, best.version)
    assert min(again.measured_at.values()) > max(record.measured_at.values())
    apart: dict[str, object] = {"measured_at": {}, "speed": None, "memory": None}
    assert replace(again, **apart) == replace(record, **apart)  # type: ignore[arg-type]


def test_an_evaluation_that_is_stopped_anywhere_ends_with_the_same_record(site: Site) -> None:
    site.train(site.spec())
    whole = timeless(quality(site, 1))
    written = evaluation_folder(site.registry, 1)
    calls = 0
    sections_so_far = set[frozenset[str]]()

    def count() -> bool:
        nonlocal calls
        calls += 1
        return False

    quality(site, 1, stop_requested=count, since=math.inf)
    for stop_at in range(1, calls + 1, max(calls // 25, 1)):
        for path in written.iterdir():
            path.unlink()
        left = stop_at

        def stop() -> bool:
            nonlocal left
            left -= 1
            return left == 0

        with pytest.raises(Stopped):
            quality(site, 1, stop_requested=stop)
        sections_so_far.update(frozenset(record.measured_at) for record in kept(site, 1))
        assert timeless(quality(site, 1)) == whole
    assert frozenset({"text"}) in sections_so_far and frozenset({"text", "training"}) in sections_so_far


def test_other_text_makes_another_record_and_the_training_text_stays_the_versions_own(site: Site) -> None:
    site.train(site.spec())
    own, other = quality(site, 1), quality(site, 1, DatasetSpec((site.other_text,)))
    assert own.method.text.name == "text.txt" and other.method.text.name == "other.txt"
    assert list(own.method.differences(other.method)) and len(kept(site, 1)) == 2
    # The difference of the losses of unlike texts is not overfitting.
    assert own.training is not None and other.training is None and other.writing is not None
    assert own.writing is not None and own.writing.training_tokens == other.writing.training_tokens > 0
    site.registry.remove(Checkpoint(1))
    assert kept(site, 1) == []


def test_validation_files_need_no_other_text(site: Site) -> None:
    site.train(site.spec())
    Path(site.text).unlink()
    record = quality(site, 1, DatasetSpec((), (site.other_text,)))
    assert record.text is not None and record.training is None
    assert record.writing is not None and record.writing.model.copied_longest is None
    (note,) = (note for note in record.notes if note.startswith("The training text cannot be read:"))
    assert "text.txt" in note


@pytest.mark.parametrize("text", ["O", "Once", "One story.<|endoftext|>", "a<|endoftext|>b"])
def test_text_that_is_shorter_than_a_window_has_figures(site: Site, tmp_path: Path, text: str) -> None:
    site.train(site.spec())
    short = tmp_path / "short.txt"
    short.write_text(text)
    record = quality(site, 1, DatasetSpec((), (str(short),)))
    assert record.text is not None and record.text.nats_per_token > 0
    assert record.method.windows == 1 and record.text.positions[0].first == 0


def test_text_without_a_token_is_an_error(site: Site, tmp_path: Path) -> None:
    site.train(site.spec())
    blank = tmp_path / "blank.txt"
    blank.write_text("<|endoftext|>")
    with pytest.raises(DataError, match=r"blank\.txt"):
        quality(site, 1, DatasetSpec((), (str(blank),)))


def test_a_window_is_at_most_the_context(site: Site) -> None:
    site.train(site.spec())
    record = quality(site, 1, window=8)
    assert (record.method.window, record.method.stride) == (8, 4)
    with pytest.raises(InvalidArgument, match="window is 17, but version 1 sees at most 16 tokens"):
        quality(site, 1, window=17)


def test_an_evaluation_needs_its_version(site: Site) -> None:
    site.train(site.spec())
    with pytest.raises(NotFound, match="no version 9"):
        evaluate_version(EvaluateSpec("9", OWN), site.attempt())


def test_a_damaged_record_is_measured_again(site: Site) -> None:
    site.train(site.spec())
    record = quality(site, 1)
    path = evaluation_folder(site.registry, 1) / f"{record.method.digest}.json"
    path.write_text(path.read_text()[:-100])
    assert timeless(quality(site, 1)) == timeless(record)
    assert json.loads(path.read_text())["method_digest"] == record.method.digest


def test_each_nth_version_of_a_run_is_evaluated_while_it_trains(site: Site) -> None:
    site.train(site.spec(evaluate_every="2"))
    assert [version.step for version in site.registry.versions()] == [3, 6, 9]
    first, second, third = (kept(site, number) for number in (1, 2, 3))
    assert first == [] and len(second) == len(third) == 1  # the last one of a run is always evaluated
    assert set(second[0].measured_at) == {"text", "training", "writing"}


def test_a_run_that_is_stopped_while_it_is_evaluated_completes_the_record_when_it_resumes(site: Site) -> None:
    spec = site.spec(evaluate_every="1")

    def stop() -> bool:
        return any(set(record.measured_at) == {"text"} for record in kept(site, 2))

    assert not site.train(spec, stop_requested=stop)
    assert [set(record.measured_at) for record in kept(site, 2)] == [{"text"}]
    assert site.train(spec)
    assert all(len(each.measured_at) == 3 for number in (1, 2, 3) for each in kept(site, number))


def test_evaluations_change_nothing_in_a_run(tmp_path: Path) -> None:
    weights = []
    for name, every in (("with", "1"), ("without", "0")):
        folder = tmp_path / name
        folder.mkdir()
        site = Site(folder)
        site.train(site.spec(evaluate_every=every))
        weights.append((version_folder(site.registry, 3) / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_an_evaluation_that_fails_does_not_fail_its_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DataError("The text is gone.")

    monkeypatch.setattr(Judge, "quality", fail)
    assert site.train(site.spec(evaluate_every="1"))
    notices = [event.text for event in site.all_told(Notice) if "The text is gone." in event.text]
    assert notices and notices[0].endswith("Training continues without the evaluation of version 1.")


def test_sections_that_are_not_measured_again_stay(site: Site) -> None:
    site.train(site.spec())
    record = quality(site, 1)
    speed = Speed("cpu", 1, 2, 100.0, 1000.0, ())
    timed = replace(record, speed=speed, measured_at=record.measured_at | {"speed": 1.0})
    site.registry.evaluations.write(1, record.method.digest, timed.to_json())
    quality(site, 1, since=math.inf)
    (kept_now,) = kept(site, 1)
    assert kept_now.speed == speed and kept_now.measured_at["speed"] == 1.0
    assert timeless(replace(kept_now, speed=None)) == timeless(record)


def test_a_record_that_is_not_text_is_measured_again(site: Site) -> None:
    site.train(site.spec())
    record = quality(site, 1)
    (evaluation_folder(site.registry, 1) / f"{record.method.digest}.json").write_bytes(b"\xff\xfe")
    assert timeless(quality(site, 1)) == timeless(record)


def test_a_version_that_fails_keeps_no_other_from_its_evaluation(site: Site) -> None:
    spec = site.spec(evaluate_every="1")
    site.train(replace(spec, config=replace(spec.config, evaluate_every=0)))
    (version_folder(site.registry, 1) / "model.safetensors").write_bytes(b"damaged")
    site.told.clear()
    site.train(spec)
    assert kept(site, 1) == [] and len(kept(site, 2)) == len(kept(site, 3)) == 1
    (notice,) = [event.text for event in site.all_told(Notice) if "without the evaluation of version 1" in event.text]
    assert "model.safetensors" in notice
