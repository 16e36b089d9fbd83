"""The versions that a queued job names still exist when the job begins: holds, on a real Redis."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, shown
from shared.registry.registry import Checkpoint, Registry
from shared.registry.retention import Retention, prune
from tests.registries import disk_registry, root_of
from tests.shared.registry.scenarios import make_manifest, publish, take_teachers, write_model
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service.commands.options import version_number
from trainer_service.jobs.events import JobState, StateChanged, TimedEvent
from trainer_service.jobs.local_files import place_of
from trainer_service.jobs.needs import Offer
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import EvaluateRequest
from trainer_service.jobs.specs import EvaluateSpec, StoriesSpec, Teacher, TrainSpec
from trainer_service.jobs.submit import on_this_machine, release_ended, submit
from trainer_service.presets import find_preset
from trainer_service.teachers import named_teachers
from trainer_service.text.corpus import DatasetSpec

SPARING = Retention(states=1, best=0, newest=0)
TEXT = DatasetSpec(("builtin",), ())


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions with their states, the last of them the best."""
    registry = disk_registry(tmp_path / "registry")
    fence = registry.take_over("run-1")
    for number in range(1, 4):
        registry.write_state(fence, 10 * number, write_model)
        registry.publish_version(
            fence, write_model, lambda number, files: make_manifest(number, files, bits_per_byte=2.0 - number / 10)
        )
    return registry


def resuming(number: int | None, run: str = "next") -> TrainSpec:
    return TrainSpec(run, "demo", find_preset("demo"), TEXT, number)


def left(registry: Registry) -> tuple[list[int], list[int]]:
    prune(registry, SPARING)
    return [version.version for version in registry.versions()], registry.states("run-1")


def test_the_version_that_a_queued_run_continues_stays_until_the_job_has_ended(
    registry: Registry, queue: JobQueue
) -> None:
    job = submit(resuming(1), queue, registry).id
    assert left(registry) == ([1, 3], [10, 30])
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.RUNNING))])
    release_ended(queue, registry)
    assert left(registry) == ([1, 3], [10, 30])
    queue.store.report(job, 1, [TimedEvent(StateChanged(JobState.FINISHED))])
    release_ended(queue, registry)
    assert left(registry) == ([3], [30])


def test_the_version_that_a_queued_evaluation_names_by_number_stays(registry: Registry, queue: JobQueue) -> None:
    job = submit(EvaluateSpec("2", TEXT), queue, registry).id
    submit(EvaluateSpec("best", TEXT), queue, registry)
    assert registry.holds.jobs() == {2: job}
    assert left(registry)[0] == [2, 3]
    queue.cancel(job)
    release_ended(queue, registry)
    assert left(registry)[0] == [3]


def test_every_reading_of_a_name_agrees_on_what_is_a_number(registry: Registry, queue: JobQueue) -> None:
    for odd in ("٣", "²", "003", "0", "9" * 19, "+3", " 3"):
        for read in (
            registry.named,
            lambda name: version_number(name, registry),
            lambda name: named_teachers([name], registry, waits=False),
            lambda name: EvaluateRequest(version=name).resolve(registry),
            lambda name: EvaluateRequest(version="3", rivals={"control": name}).resolve(registry),
        ):
            with pytest.raises(InvalidArgument, match=re.escape(shown(odd))):
                read(odd)
    assert registry.named("3").version == version_number("3", registry) == 3
    job = submit(EvaluateRequest(version="3", rivals={"a": "2"}).resolve(registry), queue, registry).id
    assert registry.holds.jobs() == {2: job, 3: job}


def taught(*teachers: Teacher, resume: int | None = None) -> TrainSpec:
    return replace(resuming(resume), teachers=teachers)


def named(registry: Registry, number: int) -> Teacher:
    return Teacher(str(number), registry.version(number).digest)


def test_the_teachers_of_a_queued_run_stay_and_so_does_the_version_that_it_continues(
    registry: Registry, queue: JobQueue
) -> None:
    spec = taught(named(registry, 1), Teacher("best"), resume=2)
    job = submit(spec, queue, registry).id
    assert registry.holds.jobs() == {1: job, 2: job}
    assert left(registry) == ([1, 2, 3], [10, 20, 30])
    queue.cancel(job)
    release_ended(queue, registry)
    assert left(registry) == ([3], [30])


def test_the_rivals_of_a_queued_evaluation_stay(registry: Registry, queue: JobQueue) -> None:
    spec = EvaluateSpec("run:next", TEXT, rivals={"teacher 1": "1", "control": "best"})
    job = submit(spec, queue, registry).id
    assert registry.holds.jobs() == {1: job}


def test_a_teacher_that_was_removed_or_replaced_is_not_queued(registry: Registry, queue: JobQueue) -> None:
    for teacher in (Teacher("9", "digest"), Teacher("2", "digest")):
        with pytest.raises(NotFound, match=f"The teacher, version {teacher.version}, is no longer in the registry"):
            submit(taught(teacher), queue, registry)
    assert list(registry.holds.ages_s()) == []


def test_a_teacher_that_only_the_continued_run_keeps_is_enough(registry: Registry, queue: JobQueue) -> None:
    teacher = named(registry, 1)
    fence = registry.take_over("run-1")
    take_teachers(registry, fence, 1)
    registry.remove(Checkpoint(1))
    submit(taught(teacher, resume=3), queue, registry)
    with pytest.raises(NotFound, match="The teacher, version 1, is no longer"):
        submit(taught(teacher), queue, registry)


def test_a_job_that_is_not_put_on_the_queue_holds_nothing(registry: Registry, queue: JobQueue) -> None:
    with pytest.raises(NotFound, match="There is no version 9"):
        submit(resuming(9), queue, registry)
    registry.remove(Checkpoint(20, "run-1"))
    with pytest.raises(NotFound, match="The state of version 2 was removed just now"):
        submit(resuming(2), queue, registry)
    submit(resuming(None, "taken"), queue, registry)
    with pytest.raises(AlreadyExists):
        submit(resuming(1, "taken"), queue, registry)
    assert list(registry.holds.ages_s()) == []


def test_a_disk_that_fills_after_a_job_was_queued_does_not_fail_the_call(
    registry: Registry, queue: JobQueue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise FailedPrecondition("The disk is full.")

    monkeypatch.setattr(registry.holds, "hand_over", fail)
    job = submit(resuming(1), queue, registry)
    assert queue.store.get(job.id).state is JobState.QUEUED
    assert f"job {job.id} holds nothing" in caplog.text


def test_a_hold_of_an_unknown_job_is_removed_after_some_time(registry: Registry, queue: JobQueue) -> None:
    registry.holds.add("new-1234", 1)
    release_ended(queue, registry)
    assert registry.holds.jobs() == {1: "new-1234"}
    path = root_of(registry) / "holds" / "new-1234"
    before_s = path.stat().st_mtime - 100
    os.utime(path, (before_s, before_s))
    release_ended(queue, registry)
    assert registry.holds.jobs() == {}


ON_STORIES = DatasetSpec(("builtin", "teacher:noon"))


def test_a_job_on_stories_that_are_absent_is_refused_unless_a_job_before_it_asks_for_them(
    queue: JobQueue, tmp_path: Path
) -> None:
    spec, place = replace(resuming(None), data=ON_STORIES), place_of(tmp_path)
    other, wanted = (queue.enqueue(StoriesSpec(name, 30, 0.5)).id for name in ("dusk", "noon"))
    between = queue.enqueue(resuming(None, "between"), [other, wanted]).id
    for after in ((), (other,), ("3f2a91c4", "\udce9")):
        with pytest.raises(NotFound, match="no set of stories 'noon'"):
            on_this_machine(spec, after, tmp_path, queue.store)
    assert on_this_machine(spec, (between,), tmp_path, queue.store) == replace(spec, stories=30, place=place)
    plain = resuming(None)
    assert on_this_machine(plain, (), tmp_path, queue.store) == plain
    alone = EvaluateSpec("best", DatasetSpec(("teacher:noon",)))
    with pytest.raises(NotFound, match="no set of stories 'noon'"):
        on_this_machine(alone, (), tmp_path, queue.store)
    assert on_this_machine(alone, (wanted,), tmp_path, queue.store) == replace(alone, place=place)


def test_a_run_reads_the_stories_that_its_set_has_when_it_is_queued_or_that_are_asked_for(
    queue: JobQueue, tmp_path: Path
) -> None:
    spec = replace(resuming(None), data=ON_STORIES)
    add_stories(tmp_path, tales(0, 4), "noon")
    place = place_of(tmp_path)
    few, many = (queue.enqueue(StoriesSpec("noon", count, 0.5)).id for count in (3, 7))
    for after, count in (((), 4), ((few,), 4), ((many,), 7), ((few, many), 7)):
        assert on_this_machine(spec, after, tmp_path, queue.store) == replace(spec, stories=count, place=place)
    assert on_this_machine(spec, (), tmp_path, queue.store, 2) == replace(spec, stories=2, place=place)


def test_the_best_version_of_a_run_that_a_job_names_stays_whatever_comes_after_it(
    registry: Registry, queue: JobQueue
) -> None:
    chain = EvaluateSpec("run:run-2", TEXT, rivals={"control": "run:run-1"})
    job = submit(chain, queue, registry).id
    assert registry.holds.runs() == {"run-1": job, "run-2": job}
    other = registry.take_over("run-2")
    for bits_per_byte in (1.5, 1.4):
        publish(registry, other, run="run-2", bits_per_byte=bits_per_byte)
    assert left(registry)[0] == [3, 5]
    queue.cancel(job)
    release_ended(queue, registry)
    assert left(registry)[0] == [5]


def test_what_a_run_has_reached_stays_while_its_job_waits_at_a_step(registry: Registry, queue: JobQueue) -> None:
    job = submit(replace(resuming(None, "run-1"), until=30), queue, registry).id
    fence = registry.take_over("later")
    registry.write_state(fence, 10, write_model)
    registry.publish_version(
        fence, write_model, lambda number, files: make_manifest(number, files, run="later", bits_per_byte=1.0)
    )
    # However long ago, and however many runs came after it.
    sparing = replace(SPARING, runs=0)
    registry.end_run("run-1")
    prune(registry, sparing)
    assert 3 in [version.version for version in registry.versions()] and registry.states("run-1") == [30]
    queue.cancel(job)
    release_ended(queue, registry)
    prune(registry, sparing)
    assert registry.states("run-1") == []


def test_what_a_large_teacher_is_paid_for_is_worked_on_where_its_ledgers_are(queue: JobQueue, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    asked = StoriesSpec("noon", 30, 0.5)
    job = queue.enqueue(on_this_machine(asked, (), here, queue.store)).id
    judged = on_this_machine(EvaluateSpec("3", DatasetSpec(()), judge_usd=0.5), (), here, queue.store)
    assert judged.place == place_of(here) != place_of(there)
    queue.store.workers.renew("there", Offer(place=place_of(there)))
    assert queue.take(Offer(place=place_of(there))) is None
    assert queue.store.get(job).awaited == f"a worker with the data folder '{place_of(here)}' of its large teacher"
    assert queue.take(Offer(place=place_of(here))) == (job, 1)


def test_a_job_knows_the_sizes_of_the_files_that_it_was_queued_with(queue: JobQueue, tmp_path: Path) -> None:
    for name in ("one.txt", "held.txt", "pairs.jsonl"):
        (tmp_path / name).write_text(name)
    text, held, pairs = (str(tmp_path / name) for name in ("one.txt", "held.txt", "pairs.jsonl"))
    run = replace(resuming(None), data=DatasetSpec((text,), (held,)))
    assert on_this_machine(run, (), tmp_path, queue.store).file_sizes == (7, 8)
    measured = EvaluateSpec("3", DatasetSpec((), (held,)), pairs=(pairs,))
    assert on_this_machine(measured, (), tmp_path, queue.store).file_sizes == (8, 11)
    (tmp_path / "one.txt").unlink()
    with pytest.raises(NotFound, match=r"one\.txt"):
        on_this_machine(run, (), tmp_path, queue.store)
