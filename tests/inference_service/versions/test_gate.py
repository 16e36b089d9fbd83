"""Versions that may serve and versions that must not, examined by a real engine."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from inference_service.grpc.translate import status_to_pb
from inference_service.versions import gate
from inference_service.versions.planner import State
from shared import version_format
from shared.decoding.cpu_decoder import CpuDecoder
from shared.errors import CorruptCheckpoint, FailedPrecondition, Unavailable
from shared.registry.findings import Finding
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import (
    BAD_SEED,
    GOOD_SEED,
    cut_off,
    flip_a_bit,
    huge_weights,
    lose_a_file,
    no_array,
    no_tokenizer,
    no_windows,
    other_shape,
    spoil_weights,
    strange_windows,
)
from tests.inference_service.world import World, polls
from tests.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "registry")


def drop(world: World, change: Callable[[Path], None], name: str) -> VersionManifest:
    """Puts a version into the registry that was changed after its commit."""
    staged = Registry(world.registry.root.parent / name)
    while len(staged.versions()) < len(world.registry.versions()) + 1:
        manifest = publish_tiny_version(staged, 0.5)
    directory = staged.version_directory(manifest.version)
    change(directory)
    directory.rename(world.registry.version_directory(manifest.version))
    return manifest


@pytest.mark.parametrize(
    ("change", "reason", "sentence"),
    [
        (spoil_weights, "not_finite", "values that are not finite"),
        (huge_weights, "not_finite", "predictions of held-out text are not finite"),
        (other_shape, "unfit", "parameters of its configuration"),
        (no_windows, "unfit", "is not a table of tokens"),
        (strange_windows, "unfit", "does not fit its model"),
        (lose_a_file, "unfit", "it has no evaluation.npy"),
        (no_array, "unfit", "evaluation.npy cannot be read"),
        (no_tokenizer, "unfit", "tokenizer"),
    ],
)
@async_test
async def test_a_version_that_cannot_serve_is_refused_with_the_reason(
    world: World, change: Callable[[Path], None], reason: str, sentence: str
) -> None:
    publish_tiny_version(world.registry, 2.0)
    bad = publish_tiny_version(world.registry, 1.0, change=change)

    async with world.running():
        await eventually(lambda: world.value("refused_versions_total", reason=reason) == 1)
        await eventually(lambda: world.serving == 1)
        with pytest.raises(FailedPrecondition, match=f"Version 2 cannot serve: .*{sentence}"):
            async with world.residents.stream(bad):
                pass
        await polls(world)
        assert world.value("refused_versions_total", reason=reason) == 1
        assert world.resident() == {"1"}
        # Nothing is left of the examined version.
        await eventually(lambda: set(world.engine._lanes) == {1})


@async_test
async def test_a_version_changed_after_its_commit_never_serves(world: World) -> None:
    async with world.running():
        publish_tiny_version(world.registry, 2.0)
        await eventually(lambda: world.serving == 1)
        drop(world, flip_a_bit, "staged")
        await eventually(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        await polls(world)
        assert world.serving == 1


@pytest.mark.parametrize("change", [cut_off, lose_a_file])
@async_test
async def test_a_version_with_missing_or_short_files_waits(world: World, change: Callable[[Path], None]) -> None:
    async with world.running():
        publish_tiny_version(world.registry, 2.0)
        await eventually(lambda: world.serving == 1)
        manifest = drop(world, change, "staged")
        await polls(world)
        two = (await world.manager.statuses())[1]
        assert (two.state, two.labels) == (State.WAITING, ())
        assert two.reason.startswith("Version 2 waits for its files: ")
        with pytest.raises(Unavailable, match="Version 2 waits for its files"):
            async with world.residents.stream(manifest):
                pass
        with pytest.raises(Unavailable, match="Version 2 waits for its files"):
            await world.manager.set_policy("pinned:2")
        assert world.serving == 1
        assert world.registry.decisions.findings().keys() == {1}


@async_test
async def test_a_version_that_is_copied_file_by_file_serves_once_it_is_whole(world: World) -> None:
    staged = Registry(world.registry.root.parent / "staged")
    publish_tiny_version(staged, 1.0)
    source, target = staged.version_directory(1), world.registry.version_directory(1)

    async with world.running():
        target.mkdir(parents=True)
        await polls(world)
        (copied,) = await world.manager.statuses()
        assert (copied.state, copied.manifest) == (State.WAITING, None)
        # The manifest first, and each file in two pieces.
        for path in sorted(source.iterdir(), key=lambda path: path.name != "manifest.json"):
            content = path.read_bytes()
            for piece in (content[: len(content) // 2], content):
                (target / path.name).write_bytes(piece)
                await polls(world)
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: bool(world.registry.decisions.findings()))
    assert [each.refusal for each in world.registry.decisions.findings()[1]] == [None]


@async_test
async def test_a_corrupt_version_is_examined_again_once_its_files_are_restored(world: World, tmp_path: Path) -> None:
    publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0)
    path = world.registry.version_directory(2) / "model.safetensors"
    whole = path.read_bytes()
    flip_a_bit(path.parent)

    async with world.running():
        await eventually(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        await eventually(lambda: world.serving == 1)
        await polls(world)
        assert (await world.manager.statuses())[1].reason.startswith("corrupt: ")
        copy = tmp_path / "copy"
        copy.write_bytes(whole)
        copy.replace(path)
        await eventually(lambda: world.serving == 2)
        assert world.value("refused_versions_total", reason="corrupt") == 1


@async_test
async def test_a_worse_version_serves_once_the_better_one_is_refused(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: world.value("refused_versions_total", reason="worse") == 1)
        assert (await world.manager.statuses())[1].state is State.REFUSED
        assert await world.manager.roll_back() == 2
        await eventually(lambda: world.serving == 2)
        one, two = await world.manager.statuses()
        assert (one.state, two.state, two.reason) == (State.REFUSED, State.SERVING, "")


@async_test
async def test_a_worse_version_serves_after_a_restart_without_the_better_one(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)
    decisions = world.registry.decisions

    async with world.running():
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: any(each.refusal for each in decisions.findings().get(2, ())))
    world.registry.remove_version(1)
    restarted = World(world.registry.root)

    async with restarted.running():
        await eventually(lambda: restarted.serving == 2)


@async_test
async def test_after_a_restart_an_unreadable_version_sets_no_standard(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=BAD_SEED)
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)

    async with world.running():
        await eventually(lambda: world.serving == 2)
    path = world.registry.version_directory(2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    restarted = World(world.registry.root)

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)


@async_test
async def test_a_version_that_claims_a_better_loss_than_it_has_is_refused(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    claims_too_much = publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async with world.running():
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        await eventually(lambda: world.serving == 1)
        two = (await world.manager.statuses())[1]
        assert two.loss == pytest.approx(claims_too_much.claimed_loss + 0.1, abs=1e-4)
        assert two.reason.startswith("loss_mismatch: it claims a held-out loss of")


@async_test
async def test_a_version_worse_than_the_serving_one_does_not_replace_it(world: World) -> None:
    async with world.running():
        publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)
        await eventually(lambda: world.serving == 1)
        # Its manifest says that it is better; measured on the same windows it is not.
        worse = publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        assert worse.claimed_loss > world.registry.version(1).claimed_loss + 0.05
        await eventually(lambda: world.value("refused_versions_total", reason="worse") == 1)
        assert world.serving == 1
        # Losses on different evaluation sets do not compare.
        publish_tiny_version(world.registry, 9.0, seed=BAD_SEED, evaluation_set="another")
        await eventually(lambda: world.serving == 3)


@async_test
async def test_a_worse_version_can_still_be_named_by_its_number(world: World) -> None:
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)
    worse = publish_tiny_version(world.registry, 2.0, seed=BAD_SEED)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        async with world.residents.stream(worse) as resident:
            assert resident.manifest == worse
        await world.manager.set_policy("pinned:2")
        await eventually(lambda: world.serving == 2)


@async_test
async def test_findings_are_remembered_after_a_restart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    good = publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: len(world.registry.decisions.findings()) == 2)
    monkeypatch.setattr(CpuDecoder, "score", lambda *_: pytest.fail("It is examined again."))
    restarted = World(world.registry.root)

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        await polls(restarted)
        assert restarted.serving == 1
        assert restarted.value("refused_versions_total", reason="loss_mismatch") == 0
        first, second = await restarted.manager.statuses()
        assert first.loss == pytest.approx(good.claimed_loss, abs=1e-4)
        assert second.reason.startswith("loss_mismatch")


@async_test
async def test_a_finding_with_an_earlier_name_of_its_reason_still_counts(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    claims_too_much = publish_tiny_version(world.registry, 1.0)
    sentence = "it claims too much"
    world.registry.decisions.keep(2, Finding(claims_too_much.digest, "cpu", 3.5, "lying", sentence, at=1.0))
    async with world.running():
        await eventually(lambda: world.serving == 1)
        with pytest.raises(FailedPrecondition, match=f"Version 2 cannot serve: {sentence}"):
            async with world.residents.stream(claims_too_much):
                pass
        two = (await world.manager.statuses())[1]
        assert (two.state, two.reason, two.loss) == (State.REFUSED, f"lying: {sentence}", 3.5)


@async_test
async def test_findings_of_another_kind_of_device_do_not_count(world: World) -> None:
    publish_tiny_version(world.registry, 1.0)
    decisions = world.registry.decisions

    async with world.running():
        await eventually(lambda: bool(decisions.findings()))
    (finding,) = decisions.findings()[1]
    elsewhere = replace(finding, device="metal", refusal="loss_mismatch", sentence="it lies", at=finding.at + 1)
    decisions.keep(1, elsewhere)
    decisions.forget(2)
    restarted = World(world.registry.root)

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        assert elsewhere in decisions.findings()[1]


@async_test
async def test_a_refused_version_cannot_be_named_while_a_server_starts(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    refused = publish_tiny_version(world.registry, 1.0)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.roll_back()
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: any(finding.refusal for finding in world.registry.decisions.findings()[2]))
    restarted = World(world.registry.root)

    async with restarted.running():
        # The server has not looked at the registry yet.
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            async with restarted.residents.stream(refused):
                pass
        await eventually(lambda: restarted.serving == 1)


@async_test
async def test_a_version_published_while_no_server_ran_must_be_as_good_as_the_one_before(world: World) -> None:
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: bool(world.registry.decisions.findings()))
    publish_tiny_version(world.registry, 0.5, seed=BAD_SEED)
    restarted = World(world.registry.root)

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        assert restarted.value("refused_versions_total", reason="worse") == 1


@async_test
async def test_a_version_with_other_held_out_windows_is_refused(world: World) -> None:
    publish_tiny_version(world.registry, 1.0)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 0.5, windows=(1, 20))
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        assert "has other held-out windows" in (await world.manager.statuses())[1].reason
        assert world.serving == 1


def tear_manifest(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:-100])


def odd_manifest(name: str, value: object) -> Callable[[Path], None]:
    """Changes a value in a manifest, and its hash with it."""

    def change(directory: Path) -> None:
        path = directory / "manifest.json"
        values = json.loads(path.read_text()) | {name: value}
        del values["sha256"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps(values | {"sha256": digest}))

    return change


def no_file(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")


@pytest.mark.parametrize(
    "damage",
    [
        tear_manifest,
        no_file,
        *(odd_manifest(name, 10**30) for name in ("step", "parameters", "validation_loss")),
        *(odd_manifest(name, value) for name, value in (("bits_per_byte", float("nan")), ("run", "\ud800"))),
        *(odd_manifest("files", [{"name": name, "size_bytes": 1, "sha256": ""}]) for name in ("a\0b", "../model")),
    ],
)
@async_test
async def test_a_version_with_a_damaged_manifest_is_listed_as_refused(
    world: World, damage: Callable[[Path], None]
) -> None:
    publish_tiny_version(world.registry, 1.0)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        drop(world, damage, "staged")
        await eventually(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        one, two = await world.manager.statuses()
        assert (one.number, one.state) == (1, State.SERVING)
        assert (two.number, two.state, two.manifest) == (2, State.REFUSED, None)
        assert two.reason.startswith("corrupt: ")
        assert len(status_to_pb(two).reason) < 1000
        await polls(world)
        assert world.value("refused_versions_total", reason="corrupt") == 1


@async_test
async def test_a_refused_version_is_examined_again_when_an_operator_loads_it(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async with world.running():
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        with pytest.raises(FailedPrecondition, match="claims a held-out loss"):
            await world.manager.load(2)
        assert world.value("refused_versions_total", reason="loss_mismatch") == 2
        await eventually(lambda: world.serving == 1)


@async_test
async def test_a_version_that_cannot_be_read_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0)
    verify = world.registry.verify
    failing = True

    def unreadable(manifest: VersionManifest) -> None:
        if failing and manifest.version == 2:
            raise OSError(5, "Input/output error")
        verify(manifest)

    monkeypatch.setattr(world.registry, "verify", unreadable)
    monkeypatch.setattr("inference_service.versions.entry.RETRY_AFTER_S", 0.2)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        two = (await world.manager.statuses())[1]
        assert "Input/output error" in two.reason and "tried again" in two.reason
        failing = False
        await eventually(lambda: world.serving == 2)
        assert world.value("refused_versions_total", reason="corrupt") == 0


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), RuntimeError("unable to allocate")])
@async_test
async def test_an_error_of_the_disk_or_of_memory_refuses_no_version(
    world: World, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    publish_tiny_version(world.registry, 1.0)
    read = version_format.read_model
    failing = iter([True])

    def fail_once(*arguments: Any) -> Any:
        if next(failing, False):
            raise CorruptCheckpoint("it cannot be read") from cause
        return read(*arguments)

    monkeypatch.setattr(gate, "read_model", fail_once)
    monkeypatch.setattr("inference_service.versions.entry.RETRY_AFTER_S", 0.1)

    async with world.running():
        await eventually(lambda: world.serving == 1)
        assert world.value("refused_versions_total", reason="unfit") == 0
    assert next(failing, None) is None
