"""Requests that fail, and what is missing."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import CorruptCheckpoint, FailedPrecondition, InvalidArgument, StoreFailed
from shared.registry.bucket import Bucket
from shared.registry.fence import Fence
from shared.registry.object_store import ObjectStore
from shared.registry.registry import Checkpoint, Registry
from tests.object_storage.proxy import Fault, FaultyProxy, Request
from tests.object_storage.server import ObjectServer, Place
from tests.shared.registry.object_store.places import is_change, is_commit, open_at
from tests.shared.registry.scenarios import RUN, make_line, publish, write_model

pytestmark = pytest.mark.slow


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
