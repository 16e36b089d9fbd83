"""Backups of jobs whose registry is in object storage."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.errors import FailedPrecondition
from tests.fakes import publish_tiny_version
from tests.jobs import training
from tests.object_storage.server import ObjectServer, Place
from tests.redis_process import RedisServer
from tests.trainer_service.backup.conftest import settings_of
from tests.trainer_service.story_sets import add_stories, tales
from trainer_service.backup.backup import write_backup
from trainer_service.backup.restore import restore_backup
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.specs import TrainSpec
from trainer_service.settings import TrainerSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def place(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = object_server.place()
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)
    return place


def in_bucket(settings: TrainerSettings, place: Place) -> TrainerSettings:
    return replace(settings, directories=replace(settings.directories, registry_url=place.url))


@pytest.fixture
def backup(tmp_path: Path, redis_server: RedisServer, place: Place) -> Path:
    """A backup of a job and a set of stories; the registry is in the bucket."""
    here = in_bucket(settings_of(tmp_path / "bucket", redis_server.address), place)
    registry = here.open_registry()
    publish_tiny_version(registry, 1.0)
    JobQueue(redis_server.connect(), registry.store.id()).enqueue(training(tmp_path, name="waits"))
    add_stories(here.directories.data, tales(0, 3))
    contents = write_backup(tmp_path / "bucket.tar", here)
    assert (contents.versions, contents.jobs) == (0, 1)
    return tmp_path / "bucket.tar"


def test_jobs_go_on_with_the_registry_in_its_bucket(
    backup: Path, there: TrainerSettings, place: Place, mortal_redis: RedisServer
) -> None:
    there = in_bucket(there, place)
    restore_backup(backup, there)
    registry = there.open_registry()
    (job,) = JobQueue(mortal_redis.connect(), registry.store.id()).store.jobs()
    assert isinstance(job.spec, TrainSpec) and job.spec.run == "waits"
    assert [each.version for each in registry.versions()] == [1]
    assert list((there.directories.data / "stories").iterdir()) and not there.directories.registry.exists()


def test_jobs_are_restored_only_with_their_registry(
    backup: Path, there: TrainerSettings, object_server: ObjectServer
) -> None:
    sentence = "has the jobs of a registry in object storage, which was at 's3://.+': GPTLOOP_REGISTRY must name this"
    for settings in (there, in_bucket(there, object_server.place())):
        with pytest.raises(FailedPrecondition, match=sentence):
            restore_backup(backup, settings)


def test_a_registry_from_a_disk_is_not_restored_into_a_bucket(
    here: TrainerSettings, there: TrainerSettings, place: Place, tmp_path: Path
) -> None:
    write_backup(tmp_path / "disk.tar", here)
    with pytest.raises(FailedPrecondition, match="has a registry from a disk: restore it into a folder"):
        restore_backup(tmp_path / "disk.tar", in_bucket(there, place))
