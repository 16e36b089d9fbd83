"""Backups of a registry and a queue that change meanwhile, and their restoration elsewhere."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from shared.errors import AlreadyExists, FailedPrecondition, Unavailable
from shared.registry.disk_store import DiskStore
from shared.registry.registry import Checkpoint, Registry
from shared.registry.snapshot import snapshot
from tests.fakes import publish_tiny_version
from tests.jobs import events_of, finish, report, start, training
from tests.redis_process import PROJECT, RedisServer
from tests.registries import disk_registry, registry_id, root_of, state_folder
from tests.trainer_service.backup.conftest import writing
from tests.waiting import wait_until
from trainer_service.backup import restore as restore_module
from trainer_service.backup.backup import write_backup
from trainer_service.backup.jobs_copy import RESTORED
from trainer_service.backup.restore import restore_backup
from trainer_service.jobs.events import Evaluation, JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_client import RedisAddress
from trainer_service.settings import TrainerSettings


@pytest.fixture
def here_queue(here: TrainerSettings, redis: Redis) -> JobQueue:
    return JobQueue(redis, registry_id(here.directories.registry))


def files_of(folder: Path) -> dict[str, bytes]:
    """Returns all files except locks and what is being written."""
    found = (path for path in folder.rglob("*") if path.is_file() and "staging" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if "lock" not in path.name}


def test_what_was_backed_up_is_restored_elsewhere(
    here: TrainerSettings, there: TrainerSettings, here_queue: JobQueue, mortal_redis: RedisServer, tmp_path: Path
) -> None:
    ended, at_work, waiting, after = (here_queue.enqueue(training(tmp_path, name=f"run-{n}")).id for n in range(4))
    later = here_queue.enqueue(training(tmp_path, name="later"), after=(at_work,)).id
    start(here_queue, ended)
    finish(here_queue, ended)
    start(here_queue, at_work)
    report(here_queue, at_work, Notice("under way"))
    here_queue.store.report(at_work, 1, [], new_tokens=70)
    contents = write_backup(tmp_path / "backup.tar", here)
    assert (contents.versions, contents.states, contents.jobs) == (2, 1, 5)
    assert (tmp_path / "backup.tar").stat().st_mode & 0o777 == 0o600
    restore_backup(tmp_path / "backup.tar", there)
    for name in ("registry", "data"):
        assert files_of(there.directories.var / name) == files_of(here.directories.var / name)
    state = state_folder(here.open_registry(), "wide", 7).relative_to(here.directories.var)
    ages = [round((settings.directories.var / state).stat().st_mtime, 2) for settings in (here, there)]
    assert ages[0] == pytest.approx(ages[1], abs=0.05)
    # The jobs wait as before, and the one that was at work begins its next attempt.
    queue = JobQueue(mortal_redis.connect(), here_queue.registry)
    jobs = (ended, at_work, waiting, after, later)
    assert [job.id for job in queue.store.jobs()] == list(reversed(jobs))
    assert queue.store.get(ended) == here_queue.store.get(ended) and queue.store.tokens() == 70
    assert queue.attempts.waiting() == [(at_work, 2), (waiting, 1), (after, 1)]
    resumed = queue.store.get(at_work)
    assert (resumed.state, resumed.attempt, resumed.reason) == (JobState.QUEUED, 2, RESTORED)
    assert events_of(queue, at_work)[:-1] == events_of(here_queue, at_work)
    assert events_of(queue, at_work)[-1] == StateChanged(JobState.QUEUED, RESTORED)
    assert queue.store.get(later).after == (at_work,) and queue.store.get(later).sent is None
    assert 0 < int(str(mortal_redis.admin().ttl(queue.store.keys.job(ended)))) <= 30 * 24 * 3600


def test_a_job_that_waits_at_its_step_still_waits_there_once_it_is_restored(
    here: TrainerSettings, there: TrainerSettings, here_queue: JobQueue, mortal_redis: RedisServer, tmp_path: Path
) -> None:
    job = here_queue.enqueue(replace(training(tmp_path), until=3)).id
    start(here_queue, job)
    here_queue.suspend(job, 1, Evaluation(3, 2.0, 1.9, 0.9))
    write_backup(tmp_path / "backup.tar", here)
    restore_backup(tmp_path / "backup.tar", there)
    queue = JobQueue(mortal_redis.connect(), here_queue.registry)
    restored = queue.store.get(job)
    assert restored == here_queue.store.get(job) and restored.is_suspended and queue.attempts.waiting() == []
    queue.extend(restored, 6)
    assert queue.attempts.waiting() == [(job, 2)]


def test_an_existing_file_is_never_replaced(here: TrainerSettings, tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    file.write_text("mine")
    with pytest.raises(AlreadyExists, match="name a new file"):
        write_backup(file, here)
    assert file.read_text() == "mine"


def test_without_redis_there_is_no_backup(here: TrainerSettings, tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        write_backup(tmp_path / "backup.tar", replace(here, redis=RedisAddress("unix:///none.sock")))
    assert not list(tmp_path.glob("backup*"))


def test_a_full_disk_leaves_no_backup(here: TrainerSettings, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(FailedPrecondition, match=r"backup\.tar cannot be written: File too large; no such file"):
            write_backup(tmp_path / "backup.tar", here)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("backup*")) and not list((here.directories.registry / "staging").iterdir())


def test_a_full_disk_leaves_nothing_restored(here: TrainerSettings, there: TrainerSettings, tmp_path: Path) -> None:
    write_backup(tmp_path / "backup.tar", here)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(FailedPrecondition, match=r"cannot be restored into .*: File too large; then repeat it"):
            restore_backup(tmp_path / "backup.tar", there)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not there.directories.registry.exists()
    restore_backup(tmp_path / "backup.tar", there)


@pytest.mark.parametrize("place", ["registry", "data/stories", "redis"])
def test_a_backup_is_restored_into_an_empty_place_only(
    here: TrainerSettings, there: TrainerSettings, mortal_redis: RedisServer, tmp_path: Path, place: str
) -> None:
    write_backup(tmp_path / "backup.tar", here)
    if place == "redis":
        JobQueue(mortal_redis.connect(), registry_id(here.directories.registry)).enqueue(training(tmp_path))
        sentence = "Redis has jobs of this registry already"
    else:
        (there.directories.var / place / "mine").mkdir(parents=True)
        sentence = "is not empty: a backup is restored into a new folder"
    before = files_of(there.directories.var)
    with pytest.raises(FailedPrecondition, match=sentence):
        restore_backup(tmp_path / "backup.tar", there)
    if place != "redis":
        assert files_of(there.directories.var) == before


# The steps are to extract, to restore the jobs, to date the folders, and to move the stories and the registry.
@pytest.mark.parametrize("deadly", [*((step,) for step in range(5)), *((4, 5 + step) for step in range(4))])
def test_a_restoration_that_was_interrupted_anywhere_can_be_repeated(
    here: TrainerSettings,
    there: TrainerSettings,
    here_queue: JobQueue,
    mortal_redis: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deadly: tuple[int, ...],
) -> None:
    job = here_queue.enqueue(training(tmp_path)).id
    write_backup(tmp_path / "backup.tar", here)
    calls = iter(range(100))

    def dying(action: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            if next(calls) in deadly:
                raise KeyboardInterrupt
            return action(*given)

        return call

    for name in ("extract", "restore_jobs", "_date_folders", "_move"):
        monkeypatch.setattr(restore_module, name, dying(getattr(restore_module, name)))
    for _ in deadly:
        with pytest.raises(KeyboardInterrupt):
            restore_backup(tmp_path / "backup.tar", there)
        assert not (there.directories.registry / "versions").exists()
    restore_backup(tmp_path / "backup.tar", there)
    assert files_of(there.directories.registry) == files_of(here.directories.registry)
    queue = JobQueue(mortal_redis.connect(), here_queue.registry)
    assert queue.attempts.waiting() == [(job, 1)] and [each.id for each in queue.store.jobs()] == [job]
    with pytest.raises(FailedPrecondition, match="is not empty"):
        restore_backup(tmp_path / "backup.tar", there)


def test_a_snapshot_has_every_state_of_its_versions_while_others_come_and_go(
    here: TrainerSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = here.open_registry()
    publish = iter([1])
    checkpoints = Registry.checkpoints

    def changing(self: Registry) -> object:
        found = checkpoints(self)
        if next(publish, None):
            # Between the list and the links, one version goes and another comes.
            self.remove(Checkpoint(1))
            publish_tiny_version(self, 0.5)
        return found

    monkeypatch.setattr(Registry, "checkpoints", changing)
    with snapshot(DiskStore(root_of(registry))) as folder:
        frozen = disk_registry(folder)
        assert [version.version for version in frozen.versions()] == [2, 3]
        assert (folder / "last_version").read_text() == "3"
        for checkpoint in checkpoints(frozen):
            frozen.check(checkpoint)
    assert not list((root_of(registry) / "staging").iterdir())


@pytest.mark.slow
def test_a_backup_that_is_killed_is_absent_or_whole_and_leaves_nothing(
    here: TrainerSettings, there: TrainerSettings, redis_server: RedisServer, tmp_path: Path
) -> None:
    registry = here.open_registry()
    fence = registry.take_over("wide")
    large = os.urandom(64 << 20)
    registry.write_state(fence, 8, writing(large))
    target = tmp_path / "backups"
    target.mkdir()
    environment = os.environ | {"GPTLOOP_VAR": str(here.directories.var), "REDIS_URL": redis_server.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "backup", str(target / "backup.tar")], cwd=PROJECT, env=environment
    )

    def has_begun() -> bool:
        with suppress(FileNotFoundError):  # a file that gets its name at this moment
            return any(path.stat().st_size for path in target.iterdir())
        return False

    wait_until(has_begun, lost=lambda: process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in target.iterdir()] in ([".partial"], [".tar"])
    registry.sweep()
    assert not list((root_of(registry) / "staging").iterdir())
    write_backup(tmp_path / "backup.tar", here)
    restore_backup(tmp_path / "backup.tar", there)


@pytest.mark.slow
def test_the_embedded_redis_is_started_for_a_backup_and_its_restoration(tmp_path: Path) -> None:
    def run(var: str, *words: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        command = [sys.executable, "-m", "deploy.cli", *words]
        given = environment | {"GPTLOOP_VAR": str(tmp_path / var)}
        ended = subprocess.run(command, cwd=PROJECT, env=given, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    publish_tiny_version(disk_registry(tmp_path / "a" / "registry"), 1.0)
    assert "1 versions, 0 states, 0 jobs" in run("a", "backup", str(tmp_path / "backup.tar"))
    assert "`gptloop up` goes on from there" in run("b", "restore", str(tmp_path / "backup.tar"))
    assert run("b", "verify") == run("a", "verify")


def test_an_event_that_is_no_text_is_restored_as_it_was(
    here: TrainerSettings, there: TrainerSettings, here_queue: JobQueue, mortal_redis: RedisServer, tmp_path: Path
) -> None:
    job = here_queue.enqueue(training(tmp_path)).id
    key = here_queue.store.keys.events(job)
    here_queue.store.redis.xadd(key, {"event": b"\xff\xfe"})
    here_queue.store.report(job, 1, [TimedEvent(Notice("ü"))])
    write_backup(tmp_path / "backup.tar", here)
    restore_backup(tmp_path / "backup.tar", there)
    assert mortal_redis.connect().xrange(key) == here_queue.store.redis.xrange(key)


def test_what_is_no_job_is_left_out_of_a_backup_that_can_be_restored(
    here: TrainerSettings, there: TrainerSettings, here_queue: JobQueue, mortal_redis: RedisServer, tmp_path: Path
) -> None:
    job = here_queue.enqueue(training(tmp_path)).id
    store = here_queue.store
    fields: Any = store.redis.hgetall(store.keys.job(job))
    for name, score in (("endless", "inf"), ("early", -1.0), ("half", 0.5), ("late", 2.0**60), ("a b", 7.0)):
        store.redis.hset(store.keys.job(name), mapping=fields)
        store.redis.zadd(store.keys.jobs, {name: score})
    assert write_backup(tmp_path / "backup.tar", here).jobs == 1
    restore_backup(tmp_path / "backup.tar", there)
    assert [each.id for each in JobQueue(mortal_redis.connect(), here_queue.registry).store.jobs()] == [job]
