"""Backups of a registry and a queue that change meanwhile, and their restoration elsewhere."""

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from shared.errors import AlreadyExists, FailedPrecondition, Unavailable
from shared.registry.fence import Fence
from shared.registry.identity import registry_id
from shared.registry.snapshot import snapshot
from shared.registry.store import Registry
from tests.fakes import publish_tiny_version
from tests.jobs import events_of, finish, report, start, training
from tests.redis_process import PROJECT, RedisServer
from tests.trainer_service.story_sets import add_stories, tales
from tests.waiting import wait_until
from trainer_service.backup import archive
from trainer_service.backup import restore as restore_module
from trainer_service.backup.backup import write_backup
from trainer_service.backup.jobs_copy import RESTORED
from trainer_service.backup.restore import restore_backup
from trainer_service.jobs.events import JobState, Notice, StateChanged, TimedEvent
from trainer_service.jobs.queue import JobQueue
from trainer_service.redis_client import RedisAddress
from trainer_service.settings import TrainerSettings, read_settings


def settings_of(var: Path, address: RedisAddress) -> TrainerSettings:
    return replace(read_settings({"GPTLOOP_VAR": str(var)}), redis=address)


def writing(content: bytes) -> Callable[[Path], None]:
    """Returns what writes the one file of a state."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(content)

    return write


@pytest.fixture
def here(tmp_path: Path, redis_server: RedisServer, admin: Redis) -> TrainerSettings:
    """A folder with two versions, the state of one, and stories that were paid for."""
    settings = settings_of(tmp_path / "here", redis_server.address)
    registry = settings.open_registry()
    for bits_per_byte in (3.0, 1.0):
        publish_tiny_version(registry, bits_per_byte)
    fence = Fence.raise_for(registry.run_directory("wide"))
    registry.write_state(fence, "wide", 7, writing(b"weights"))
    registry.decisions.set_stable(2)
    findings = registry.root / "serving" / "findings"
    findings.mkdir()
    (findings / "2.cpu.json").write_text("{}")
    add_stories(settings.directories.data, tales(0, 3))
    return settings


@pytest.fixture
def there(tmp_path: Path, mortal_redis: RedisServer) -> TrainerSettings:
    """A new folder and an empty Redis."""
    return settings_of(tmp_path / "there", mortal_redis.address)


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
    state = here.open_registry().state_directory("wide", 7).relative_to(here.directories.var)
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


@pytest.mark.parametrize("killed_at", range(5))
def test_a_restoration_that_was_interrupted_anywhere_can_be_repeated(
    here: TrainerSettings,
    there: TrainerSettings,
    here_queue: JobQueue,
    mortal_redis: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    job = here_queue.enqueue(training(tmp_path)).id
    write_backup(tmp_path / "backup.tar", here)
    calls = iter(range(100))

    def dying(action: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return action(*given)

        return call

    for name in ("extract", "restore_jobs", "_date_folders", "_move"):
        monkeypatch.setattr(restore_module, name, dying(getattr(restore_module, name)))
    with pytest.raises(KeyboardInterrupt):
        restore_backup(tmp_path / "backup.tar", there)
    assert not (there.directories.registry / "versions").exists()
    restore_backup(tmp_path / "backup.tar", there)
    assert files_of(there.directories.registry) == files_of(here.directories.registry)
    queue = JobQueue(mortal_redis.connect(), here_queue.registry)
    assert queue.attempts.waiting() == [(job, 1)] and [each.id for each in queue.store.jobs()] == [job]
    with pytest.raises(FailedPrecondition, match="is not empty"):
        restore_backup(tmp_path / "backup.tar", there)


def rewrite(source: Path, target: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Copies a backup with other members and a right list of hashes."""
    with tarfile.open(source) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}  # type: ignore[union-attr]
    contents.pop(archive.HASHES_NAME)
    change(contents)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    contents[archive.HASHES_NAME] = json.dumps(hashes).encode()
    with tarfile.open(target, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def newer(contents: dict[str, bytes]) -> None:
    values = json.loads(contents[archive.DESCRIPTION_NAME])
    contents[archive.DESCRIPTION_NAME] = json.dumps(values | {"format": 2, "written_by": "gptloop 9.0"}).encode()


def described(**changed: object) -> Callable[[dict[str, bytes]], None]:
    """Returns what changes the description of a backup."""

    def change(contents: dict[str, bytes]) -> None:
        values = json.loads(contents[archive.DESCRIPTION_NAME])
        contents[archive.DESCRIPTION_NAME] = json.dumps(values | changed).encode()

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (newer, r"written by a newer gptloop \('gptloop 9\.0'\), in format 2, and this one reads formats up to 1"),
        (lambda contents: contents.update({"registry/../../evil": b""}), "which `gptloop backup` would not write"),
        (lambda contents: contents.update({"/tmp/evil": b""}), "which `gptloop backup` would not write"),
        (lambda contents: contents.update({"log/evil": b""}), "which `gptloop backup` would not write"),
        (lambda contents: contents.pop(archive.DESCRIPTION_NAME), "not a backup of gptloop"),
        (lambda contents: contents.update({archive.DESCRIPTION_NAME: b"[" * 100_000}), "cannot be restored"),
        (lambda contents: contents.update({archive.DESCRIPTION_NAME: b'{"format": 1}'}), "cannot be restored"),
        (lambda contents: contents.update({archive.DESCRIPTION_NAME: b"7"}), "its description is not one that"),
        (lambda contents: contents.pop(archive.JOBS_NAME), r"it has no 'jobs\.jsonl'"),
        (described(created_at=1e300), r"created_at is 1e\+300 in its description"),
        (described(created_at="yesterday"), "created_at is 'yesterday' in its description"),
        (described(created_at=float("nan")), "created_at is nan in its description"),
        (described(registry=7), "registry is 7 in its description"),
        (described(format="1"), "its description is not one that"),
    ],
)
def test_a_foreign_or_newer_backup_is_refused(
    here: TrainerSettings,
    there: TrainerSettings,
    tmp_path: Path,
    change: Callable[[dict[str, bytes]], None],
    sentence: str,
) -> None:
    write_backup(tmp_path / "backup.tar", here)
    rewrite(tmp_path / "backup.tar", tmp_path / "changed.tar", change)
    with pytest.raises(FailedPrecondition, match=sentence):
        restore_backup(tmp_path / "changed.tar", there)
    assert not there.directories.registry.exists() and not (tmp_path / "evil").exists()


COUNTERS = {"tokens": 0, "diverged": 0}
FIELDS = {"kind": "train", "spec": "{}", "state": "queued", "attempt": "1", "sent": "1"}
JOB = {"id": "a", "ticket": 1, "fields": FIELDS, "events": [["1-0", {"event": "x"}]]}


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "line 1 of .*there is none"),
        ([b"nothing"], "line 1 of .*"),
        ([b"[" * 100_000], "line 1 of .*"),
        ([b'{"tokens": ' + b"9" * 5000 + b"}"], "line 1 of .*"),
        ([7], "line 1 of .*it is not an object"),
        ([{"tokens": 1}], "line 1 of .*it has no 'diverged'"),
        ([COUNTERS | {"tokens": 1e300}], "line 1 of .*tokens is 1e[+]300, but must be a number from 0"),
        ([COUNTERS | {"tokens": 1 << 63}], "line 1 of .*tokens is 9223372036854775808"),
        ([COUNTERS, JOB, [JOB]], "line 3 of .*it is not an object"),
        ([COUNTERS, JOB, JOB], "line 3 of .*the job a is there twice"),
        ([COUNTERS, {"id": "a"}], "line 2 of .*it has no 'events'"),
        ([COUNTERS, JOB | {"id": "a b"}], "line 2 of .*id is 'a b'"),
        ([COUNTERS, JOB | {"id": 7}], "line 2 of .*id is 7"),
        ([COUNTERS, JOB | {"ticket": "1"}], "line 2 of .*ticket is '1'"),
        ([COUNTERS, JOB | {"ticket": True}], "line 2 of .*ticket is True"),
        ([COUNTERS, JOB | {"ticket": 1 << 60}], "line 2 of .*ticket is 1152921504606846976"),
        ([COUNTERS, JOB | {"fields": []}], "line 2 of .*fields is"),
        ([COUNTERS, JOB | {"fields": {}}], "line 2 of .*fields is"),
        ([COUNTERS, JOB | {"fields": {"attempt": 1}}], "line 2 of .*fields is"),
        ([COUNTERS, JOB | {"fields": {"state": "\ud800"}}], "line 2 of .*which no program can write"),
        ([COUNTERS, JOB | {"events": {}}], "line 2 of .*events is"),
        ([COUNTERS, JOB | {"events": [7]}], "line 2 of .*an event is 7"),
        ([COUNTERS, JOB | {"events": [["1-0", {}]]}], "line 2 of .*an event is"),
        ([COUNTERS, JOB | {"events": [["*", {"event": "x"}]]}], "line 2 of .*'[*]' does not follow"),
        ([COUNTERS, JOB | {"events": [["9" * 30 + "-1", {"event": "x"}]]}], "line 2 of .*does not follow"),
        ([COUNTERS, JOB | {"events": [["2-0", {"a": "x"}], ["1-0", {"a": "x"}]]}], "line 2 of .*'1-0' does not follow"),
    ],
)
def test_jobs_that_no_backup_has_are_refused_before_anything_is_written(
    here: TrainerSettings,
    there: TrainerSettings,
    mortal_redis: RedisServer,
    tmp_path: Path,
    lines: list[object],
    sentence: str,
) -> None:
    text = b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    write_backup(tmp_path / "backup.tar", here)
    rewrite(
        tmp_path / "backup.tar", tmp_path / "changed.tar", lambda contents: contents.update({archive.JOBS_NAME: text})
    )
    with pytest.raises(FailedPrecondition, match=sentence):
        restore_backup(tmp_path / "changed.tar", there)
    assert not there.directories.registry.exists() and not mortal_redis.admin().keys()


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "dream"},
        {"spec": "[" * 10_000},
        {"attempt": "9" * 50},
        {"attempt": "999999999", "state": "running"},
        {"state": "asleep"},
        {"state": "finished", "ended_at": "1e300"},
        {"state": "finished", "ended_at": "soon"},
        {"after": "b c", "until": "inf", "delay_s": "-1", "Progress": "{}"},
    ],
)
def test_a_job_that_nobody_understands_is_restored_and_shown(
    here: TrainerSettings, there: TrainerSettings, mortal_redis: RedisServer, tmp_path: Path, changed: dict[str, str]
) -> None:
    lines = [COUNTERS, JOB | {"fields": FIELDS | changed}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    write_backup(tmp_path / "backup.tar", here)
    rewrite(
        tmp_path / "backup.tar", tmp_path / "changed.tar", lambda contents: contents.update({archive.JOBS_NAME: text})
    )
    restore_backup(tmp_path / "changed.tar", there)
    queue = JobQueue(mortal_redis.connect(), registry_id(there.directories.registry))
    (job,) = queue.store.jobs()
    assert (job.id, job.spec) == ("a", None) and "cannot be understood" in job.reason


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_links_and_folders_in_a_backup_are_refused(
    here: TrainerSettings, there: TrainerSettings, tmp_path: Path, kind: bytes
) -> None:
    write_backup(tmp_path / "backup.tar", here)
    with tarfile.open(tmp_path / "backup.tar") as tar, tarfile.open(tmp_path / "changed.tar", "w") as changed:
        for member in tar:
            changed.addfile(member, tar.extractfile(member))
            if member.name == archive.JOBS_NAME:
                link = tarfile.TarInfo("registry/versions")
                link.type, link.linkname = kind, "/tmp"
                changed.addfile(link)
    with pytest.raises(FailedPrecondition, match="'registry/versions', which `gptloop backup` would not write"):
        restore_backup(tmp_path / "changed.tar", there)


def test_a_backup_that_is_cut_off_or_changed_anywhere_is_refused(
    here: TrainerSettings, there: TrainerSettings, tmp_path: Path
) -> None:
    write_backup(tmp_path / "backup.tar", here)
    content = (tmp_path / "backup.tar").read_bytes()
    file = tmp_path / "damaged.tar"
    # The end of a tar is filled up with zeros.
    end = len(content.rstrip(b"\0"))
    for size_bytes in range(0, end, 7919):
        file.write_bytes(content[:size_bytes])
        with pytest.raises(FailedPrecondition, match="cannot be restored"):
            archive.extract(file, _new(tmp_path / "x"))
    with tarfile.open(tmp_path / "backup.tar") as tar:
        places = [member.offset_data + member.size // 2 for member in tar if member.size]
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(FailedPrecondition, match="cannot be restored"):
            archive.extract(file, _new(tmp_path / "x"))


def _new(folder: Path) -> Path:
    number = len(list(folder.parent.glob(f"{folder.name}*")))
    (new := folder.with_name(f"{folder.name}{number}")).mkdir()
    return new


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
            self.remove_version(1)
            publish_tiny_version(self, 0.5)
        return found

    monkeypatch.setattr(Registry, "checkpoints", changing)
    with snapshot(registry) as folder:
        frozen = Registry(folder)
        assert [version.version for version in frozen.versions()] == [2, 3]
        assert (folder / "last_version").read_text() == "3"
        for checkpoint in checkpoints(frozen):
            frozen.check(checkpoint)
    assert not list((registry.root / "staging").iterdir())


@pytest.mark.slow
def test_a_backup_that_is_killed_is_absent_or_whole_and_leaves_nothing(
    here: TrainerSettings, there: TrainerSettings, redis_server: RedisServer, tmp_path: Path
) -> None:
    registry = here.open_registry()
    fence = Fence.raise_for(registry.run_directory("wide"))
    large = os.urandom(64 << 20)
    registry.write_state(fence, "wide", 8, writing(large))
    target = tmp_path / "backups"
    target.mkdir()
    environment = os.environ | {"GPTLOOP_VAR": str(here.directories.var), "REDIS_URL": redis_server.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "backup", str(target / "backup.tar")], cwd=PROJECT, env=environment
    )
    wait_until(lambda: any(path.stat().st_size for path in target.iterdir()), lost=lambda: process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in target.iterdir()] in ([".partial"], [".tar"])
    registry.sweep()
    assert not list((registry.root / "staging").iterdir())
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

    publish_tiny_version(Registry(tmp_path / "a" / "registry"), 1.0)
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
