"""Backups that are refused: damaged, foreign, hostile, or of a newer program."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from tests.redis_process import RedisServer
from tests.registries import registry_id
from trainer_service.backup import archive
from trainer_service.backup.backup import write_backup
from trainer_service.backup.restore import restore_backup
from trainer_service.jobs.queue import JobQueue
from trainer_service.settings import TrainerSettings


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
