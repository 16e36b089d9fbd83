"""What only object storage has: requests that fail, local copies, and a commit in two objects."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from shared.errors import CorruptCheckpoint, FailedPrecondition, InvalidArgument, RunOwnershipLost, StoreFailed
from shared.registry import bucket, object_files, object_runs, object_versions
from shared.registry.bucket import Bucket, Conflict
from shared.registry.fence import Fence
from shared.registry.manifest import FileRecord
from shared.registry.object_files import ObjectFiles
from shared.registry.object_runs import ObjectRuns
from shared.registry.object_store import ObjectStore
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.proxy import Fault, FaultyProxy, Request
from tests.object_storage.server import ObjectServer, Place
from tests.shared.registry.scenarios import RUN, make_line, make_manifest, publish, write_model

pytestmark = pytest.mark.slow


@pytest.fixture
def place(object_server: ObjectServer, object_proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = object_server.place().behind(object_proxy.endpoint)
    use(place, monkeypatch)
    # A silent store costs a test these seconds.
    monkeypatch.setattr(bucket, "_REQUEST_S", 0.5)
    monkeypatch.setattr(bucket, "_RETRY_S", 2.0)
    return place


def use(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place.settings.items():
        monkeypatch.setenv(name, value)


def open_at(place: Place, cache: Path, limit_bytes: int = 1 << 30) -> Registry:
    return Registry(ObjectStore(place.url, cache, limit_bytes))


@pytest.fixture
def registry(place: Place, tmp_path: Path) -> Registry:
    return open_at(place, tmp_path / "cache")


@pytest.fixture
def fence(registry: Registry) -> Fence:
    return registry.take_over(RUN)


def store_of(registry: Registry) -> ObjectStore:
    assert isinstance(registry.store, ObjectStore)
    return registry.store


def is_commit(request: Request) -> bool:
    return request.conditional and request.writes("/versions/")


def is_change(request: Request) -> bool:
    return request.conditional and request.writes("/texts/runs/")


# Requests that fail

PASSING = [Fault.RESET, Fault.ERROR_500, Fault.ERROR_503, Fault.SILENCE]
DONE = [Fault.DONE_THEN_RESET, Fault.DONE_THEN_500, Fault.DONE_THEN_SILENCE]


@pytest.mark.parametrize("fault", [*PASSING, *DONE, Fault.CONFLICT_409, Fault.PRECONDITION_412], ids=str)
@pytest.mark.parametrize("matches", [is_commit, is_change], ids=["commit", "change"])
def test_a_write_whose_outcome_is_unknown_takes_place_once(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy, matches: Callable[[Request], bool], fault: Fault
) -> None:
    rule = object_proxy.inject(fault, matches, times=2)
    versions = [publish(registry, fence), publish(registry, fence)]
    registry.write_state(fence, 1, write_model)
    assert rule.hits > 0
    object_proxy.clear()
    # A number that is left out could be taken later, by whoever has been replaced meanwhile.
    assert [each.version for each in versions] == [1, 2]
    assert registry.versions() == versions and registry.states(RUN) == [1]
    for checkpoint in registry.checkpoints():
        registry.check(checkpoint)


@pytest.mark.parametrize("fault", [*PASSING, Fault.TORN_BODY, Fault.ALTERED_BODY, Fault.SLOW_BODY], ids=str)
@pytest.mark.parametrize("part", ["/files/", "/versions/", "/texts/"])
def test_a_read_that_fails_or_arrives_damaged_is_repeated(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path, part: str, fault: Fault
) -> None:
    version = publish(registry, fence)
    registry.decisions.set_stable(1)
    reader = open_at(place, tmp_path / "other")
    rule = object_proxy.inject(fault, lambda request: request.reads(part))
    assert reader.versions() == [version] and reader.decisions.stable() == 1
    assert (reader.fetch(version) / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert rule.hits == 1


def test_files_that_are_damaged_in_the_store_are_an_error_and_leave_no_copy(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    version = publish(registry, fence)
    reader = open_at(place, tmp_path / "other")
    object_proxy.inject(Fault.ALTERED_BODY, lambda request: request.reads("/files/"), times=None)
    for act in (reader.fetch, reader.verified, reader.verify):
        with pytest.raises(CorruptCheckpoint, match=r"\((model|config)\..*SHA-256"):
            act(version)
    object_proxy.clear()
    assert reader.verified(version).is_dir()


def test_a_text_that_was_altered_in_the_store_is_an_error(place: Place, registry: Registry) -> None:
    registry.decisions.set_stable(1)
    plain = Bucket(place.url)
    content, _ = plain.read("texts/serving")
    plain.upload("texts/serving", content.replace(b'"stable": ["1"', b'"stable": ["2"'))
    with pytest.raises(CorruptCheckpoint, match=r"texts/serving cannot be understood"):
        registry.decisions.stable()


def test_a_missing_file_is_an_error_that_names_it(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path
) -> None:
    version = publish(registry, fence)
    plain = Bucket(place.url)
    plain.delete(each.name for each in plain.list("files"))
    with pytest.raises(CorruptCheckpoint, match=r"\(config\.json\) is missing|\(model\.safetensors\) is missing"):
        open_at(place, tmp_path / "other").fetch(version)
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        registry.check(Checkpoint(1))


def test_a_store_that_is_away_is_an_error_to_writers_and_to_readers(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy
) -> None:
    publish(registry, fence)
    rule = object_proxy.inject(Fault.RESET, times=None)
    acts: list[tuple[str, Callable[[], object]]] = [
        ("read", registry.versions),
        ("read", lambda: registry.decisions.set_stable(1)),
        ("read", lambda: publish(registry, fence)),
        ("read", lambda: registry.histories.writer(fence, 0).append(make_line(1), synced=True)),
    ]
    for verb, act in acts:
        with pytest.raises(
            StoreFailed, match=rf"cannot be {verb}: it does not answer at http://127.*; check"
        ) as raised:
            act()
        assert isinstance(raised.value, FailedPrecondition) and isinstance(raised.value, OSError)
    assert rule.hits > len(acts)
    object_proxy.clear()
    assert publish(registry, fence).version == 2


def test_a_missing_bucket_and_wrong_keys_are_named(
    object_server: ObjectServer, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreFailed, match="there is no bucket nowhere; create it"):
        Registry(ObjectStore("s3://nowhere/here", tmp_path, 1)).holds.jobs()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in (lambda each: each.versions(), lambda each: each.holds.jobs(), lambda each: each.take_over(RUN)):
        with pytest.raises(StoreFailed, match=r"it refuses the keys \(.+\); check AWS_ACCESS_KEY_ID"):
            act(open_at(place, tmp_path))


def test_an_address_without_tls_has_to_be_allowed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(
        InvalidArgument, match=r"AWS_ENDPOINT_URL is 'http://.+', which encrypts nothing; AWS_ALLOW_HTTP"
    ):
        open_at(place, tmp_path)


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(FailedPrecondition, match=r"obstore is not installed.*: make \.venv/object-storage"):
        Bucket("s3://bucket/prefix")


@pytest.mark.parametrize("url", ["s3://", "s3:/bucket/x", "ftp://bucket/x", "s3:///x", "s3://[x"])
def test_a_url_that_is_none_is_an_error(url: str) -> None:
    with pytest.raises(InvalidArgument, match=r"GPTLOOP_REGISTRY is .* but must be a folder, or s3://"):
        Bucket(url)


# The commit of a version in two objects


def test_a_version_that_a_replaced_owner_creates_in_the_last_moment_is_never_seen(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    publish(registry, fence)
    others: list[Fence] = []

    def replaced_meanwhile(number: int, files: object) -> object:
        # After the check of the fence, before the number is taken.
        others.append(open_at(place, tmp_path / "other").take_over(RUN))
        return make_manifest(number, files)  # type: ignore[arg-type]

    with pytest.raises(RunOwnershipLost):
        registry.publish_version(fence, write_model, replaced_meanwhile)  # type: ignore[arg-type]
    assert [each.version for each in registry.versions()] == [1]
    assert publish(registry, others[0]).version == 3


def test_a_state_of_an_owner_who_is_replaced_during_the_upload_is_not_committed(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = ObjectFiles.upload

    def replaced_meanwhile(files: ObjectFiles, folder: Path, records: Sequence[FileRecord]) -> str:
        open_at(place, tmp_path / "other").take_over(RUN)
        return upload(files, folder, records)

    monkeypatch.setattr(ObjectFiles, "upload", replaced_meanwhile)
    with pytest.raises(RunOwnershipLost):
        registry.write_state(fence, 1, write_model)
    assert registry.states(RUN) == [] and Bucket(place.url).list("files") == []


def test_a_state_that_was_committed_unconfirmed_before_the_next_owner_keeps_its_files(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_at(place, tmp_path / "other")
    replace = Bucket.replace

    def unconfirmed(self: Bucket, name: str, content: bytes, e_tag: str) -> None:
        replace(self, name, content, e_tag)
        monkeypatch.setattr(Bucket, "replace", replace)
        other.take_over(RUN)
        raise Conflict(name)

    monkeypatch.setattr(Bucket, "replace", unconfirmed)
    registry.write_state(fence, 1, write_model)
    other.check(Checkpoint(1, RUN))
    with pytest.raises(RunOwnershipLost):
        registry.write_state(fence, 2, write_model)


def test_a_version_of_a_replaced_owner_who_died_is_never_seen(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, fence)
    newer: list[Fence] = []

    def die(runs: ObjectRuns, run: str, token: int, number: int) -> bool:
        raise KeyboardInterrupt

    def replaced_meanwhile(number: int, files: object) -> object:
        newer.append(open_at(place, tmp_path / "other").take_over(RUN))
        monkeypatch.setattr(ObjectRuns, "owned", die)
        return make_manifest(number, files)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        registry.publish_version(fence, write_model, replaced_meanwhile)  # type: ignore[arg-type]
    monkeypatch.undo()
    use(place, monkeypatch)
    reader = open_at(place, tmp_path / "reader")
    assert [each.version for each in reader.versions()] == [1] and publish(reader, newer[0]).version == 3
    assert [each.version for each in reader.versions()] == [1, 3]


def test_a_takeover_whose_owner_died_in_the_middle_is_settled_by_the_next_reader(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    other = open_at(place, tmp_path / "other")
    with monkeypatch.context() as patched:
        patched.setattr(ObjectRuns, "_settle", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            other.take_over(RUN)
    assert open_at(place, tmp_path / "reader").versions() == [version]
    with pytest.raises(RunOwnershipLost):
        publish(registry, fence)


# Requests


def test_a_look_reads_only_what_is_new(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    reader = open_at(place, tmp_path / "other")
    for _ in range(3):
        publish(registry, fence)
    assert len(reader.versions()) == 3
    object_proxy.clear()
    assert len(reader.versions()) == 3
    assert [request.lists for request in object_proxy.requests] == [True]
    publish(registry, fence)
    registry.remove(Checkpoint(1))
    object_proxy.clear()
    assert [each.version for each in reader.versions()] == [2, 3, 4]
    assert [each.path.rpartition("/")[2] for each in object_proxy.requests if each.reads("/versions/")] == ["4"]


def test_many_versions_are_read_once_on_a_machine(
    place: Place,
    registry: Registry,
    fence: Fence,
    object_proxy: FaultyProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(object_versions, "_MANY", 3)
    versions = [publish(registry, fence) for _ in range(4)]
    registry.remove(Checkpoint(1))
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]
    object_proxy.clear()
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]
    assert not [each for each in object_proxy.requests if each.reads("/versions/")]
    (tmp_path / "cache" / registry.store.id() / "versions.json").write_text("{")
    assert open_at(place, tmp_path / "cache").versions() == versions[1:]


def test_reports_are_no_requests_until_they_are_synced(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy
) -> None:
    writer = registry.histories.writer(fence, 0)
    writer.append(make_line(1))
    object_proxy.clear()
    for step in range(2, 100):
        writer.append(make_line(step))
    assert object_proxy.requests == []
    writer.append(make_line(100), synced=True)
    assert 0 < len(object_proxy.requests) < 6
    assert len(registry.histories.read(RUN).evaluations) == 100


def test_a_store_that_fails_costs_no_lines_but_time(
    registry: Registry, fence: Fence, object_proxy: FaultyProxy
) -> None:
    writer = registry.histories.writer(fence, 0)
    writer.append(make_line(1), synced=True)
    object_proxy.inject(Fault.ERROR_500, times=None)
    with pytest.raises(StoreFailed, match=r"answers with status 500 \(InternalError\)"):
        writer.append(make_line(2), synced=True)
    object_proxy.clear()
    writer.append(make_line(3), synced=True)
    assert [each.step for each in registry.histories.read(RUN).evaluations] == [1, 2, 3]


# Local copies


def test_a_copy_is_fetched_once_and_again_if_it_was_damaged(
    place: Place, registry: Registry, fence: Fence, object_proxy: FaultyProxy, tmp_path: Path
) -> None:
    version = publish(registry, fence)
    object_proxy.clear()
    folder = registry.verified(version)
    reader = open_at(place, tmp_path / "cache")
    assert reader.verified(version) == folder
    assert not [each for each in object_proxy.requests if each.reads("/files/")]
    (folder / "config.json").write_text("[]")
    assert (reader.verified(version) / "config.json").read_text() == "{}"
    assert len([each for each in object_proxy.requests if each.reads("/files/")]) == 2


def test_copies_have_at_most_their_size_and_the_newest_stay(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.registry.object_cache._HELD", 1)
    versions = [publish(registry, fence) for _ in range(4)]
    size_bytes = versions[0].size_bytes + len(versions[0].to_json())
    reader = open_at(place, tmp_path / "small", limit_bytes=2 * size_bytes)
    other = open_at(place, tmp_path / "small", limit_bytes=2 * size_bytes)
    first = reader.fetch(versions[0])
    os.utime(first, (0, 0))
    kept = [other.fetch(version) for version in versions[1:]]
    # What another process has fetched last stays, however old it is.
    assert first.is_dir() and kept[-1].is_dir() and not kept[0].exists() and not kept[1].exists()
    assert (other.fetch(versions[1]) / "config.json").read_text() == "{}"


def test_a_copy_that_finds_no_room_is_an_error(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="cannot be written: Not a directory"):
        open_at(place, tmp_path / "file").fetch(version)


# Sweeping


def abandon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what is left behind count as old."""
    for module in (object_files, object_versions):
        monkeypatch.setattr(module, "ABANDONED_S", -1.0)


def test_what_dead_processes_leave_goes_after_a_day(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = Bucket(place.url), registry.store.id()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "create", die)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, fence)
    version = publish(registry, fence)
    with monkeypatch.context() as patched:
        patched.setattr(Bucket, "delete", die)
        with pytest.raises(KeyboardInterrupt):
            registry.write_state(fence, 1, write_model)
    registry.sweep()
    assert len(plain.list("files")) == 6 and len(plain.list("staging")) == 2
    abandon(monkeypatch)
    registry.sweep()
    assert plain.list("staging") == [] and len(plain.list("files")) == 4
    registry.check(Checkpoint(version.version))
    registry.check(Checkpoint(1, RUN))


@pytest.mark.parametrize("checkpoint", [Checkpoint(1), Checkpoint(1, RUN)], ids=str)
def test_what_a_dead_process_was_about_to_remove_is_shown_again(
    place: Place,
    registry: Registry,
    fence: Fence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
) -> None:
    publish(registry, fence)
    registry.write_state(fence, 1, write_model)

    def die() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.remove(checkpoint, unless=die)
    other = open_at(place, tmp_path / "other")
    assert checkpoint not in other.checkpoints()
    other.sweep()
    assert checkpoint not in other.checkpoints()
    for module in (object_runs, object_versions):
        monkeypatch.setattr(module, "HIDDEN_S", -1.0)
    other.sweep()
    assert checkpoint in other.checkpoints()
    other.check(checkpoint)


@pytest.mark.parametrize("checkpoint", [Checkpoint(1), Checkpoint(1, RUN)], ids=str)
def test_what_was_shown_again_during_a_long_removal_is_not_removed(
    place: Place,
    registry: Registry,
    fence: Fence,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Checkpoint,
) -> None:
    publish(registry, fence)
    registry.write_state(fence, 1, write_model)
    other = open_at(place, tmp_path / "other")
    for module in (object_runs, object_versions):
        monkeypatch.setattr(module, "HIDDEN_S", -1.0)

    def pause() -> bool:
        other.sweep()
        return False

    assert not registry.remove(checkpoint, unless=pause)
    other.check(checkpoint)


def test_a_sweep_keeps_the_files_of_a_version_that_is_hidden(
    place: Place, registry: Registry, fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish(registry, fence)
    id = registry.store.state(f"versions/{version.version}")
    # Its publisher died before it removed this object.
    Bucket(place.url).upload(f"staging/{id}", b"files")
    other = open_at(place, tmp_path / "other")
    abandon(monkeypatch)

    def is_needed() -> bool:
        other.sweep()
        return True

    assert not registry.remove(Checkpoint(version.version), unless=is_needed)
    other.check(Checkpoint(version.version))


def test_empty_objects_of_old_removals_go_but_not_that_of_the_highest_number(
    place: Place, registry: Registry, fence: Fence, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        publish(registry, fence)
    for number in (1, 3):
        registry.remove(Checkpoint(number))
    abandon(monkeypatch)
    registry.sweep()
    assert [each.name for each in Bucket(place.url).list("versions")] == ["versions/2", "versions/3"]
    assert publish(registry, fence).version == 4
