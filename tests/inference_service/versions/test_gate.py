"""Versions that deserve to serve and versions that do not, as a real engine examines them."""

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
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry
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
from tests.inference_service.world import World, polls, run
from tests.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "registry")


def drop(world: World, change: Callable[[Path], None], name: str) -> VersionManifest:
    """Puts a version into the registry that was changed after it had been committed."""
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
def test_what_cannot_serve_is_refused_with_the_reason(
    world: World, change: Callable[[Path], None], reason: str, sentence: str
) -> None:
    publish_tiny_version(world.registry, 2.0)
    bad = publish_tiny_version(world.registry, 1.0, change=change)

    async def test() -> None:
        await eventually(lambda: world.value("refused_versions_total", reason=reason) == 1)
        await eventually(lambda: world.serving == 1)
        with pytest.raises(FailedPrecondition, match=f"Version 2 cannot serve: .*{sentence}"):
            async with world.residents.stream(bad):
                pass
        await polls(world)
        assert world.value("refused_versions_total", reason=reason) == 1
        assert world.resident() == {"1"}
        # Nothing is left of what was examined.
        await eventually(lambda: set(world.engine._lanes) == {1})

    run(world, test)


def test_what_was_changed_after_its_commit_never_serves(world: World) -> None:
    async def test() -> None:
        publish_tiny_version(world.registry, 2.0)
        await eventually(lambda: world.serving == 1)
        drop(world, flip_a_bit, "staged")
        await eventually(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        await polls(world)
        assert world.serving == 1

    run(world, test)


@pytest.mark.parametrize("change", [cut_off, lose_a_file])
def test_missing_and_short_files_are_waited_for(world: World, change: Callable[[Path], None]) -> None:
    async def test() -> None:
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

    run(world, test)


def test_a_version_that_is_copied_file_by_file_serves_once_it_is_whole(world: World) -> None:
    staged = Registry(world.registry.root.parent / "staged")
    publish_tiny_version(staged, 1.0)
    source, target = staged.version_directory(1), world.registry.version_directory(1)

    async def test() -> None:
        target.mkdir(parents=True)
        await polls(world)
        (nothing,) = await world.manager.statuses()
        assert (nothing.state, nothing.manifest) == (State.WAITING, None)
        # The manifest first, and each file in two pieces.
        for path in sorted(source.iterdir(), key=lambda path: path.name != "manifest.json"):
            content = path.read_bytes()
            for piece in (content[: len(content) // 2], content):
                (target / path.name).write_bytes(piece)
                await polls(world)
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: bool(world.registry.decisions.findings()))

    run(world, test)
    assert [each.refusal for each in world.registry.decisions.findings()[1]] == [None]


def test_a_corrupt_version_is_examined_again_once_its_files_are_brought_back(world: World, tmp_path: Path) -> None:
    publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0)
    path = world.registry.version_directory(2) / "model.safetensors"
    whole = path.read_bytes()
    flip_a_bit(path.parent)

    async def test() -> None:
        await eventually(lambda: world.value("refused_versions_total", reason="corrupt") == 1)
        await eventually(lambda: world.serving == 1)
        await polls(world)
        assert (await world.manager.statuses())[1].reason.startswith("corrupt: ")
        copy = tmp_path / "copy"
        copy.write_bytes(whole)
        copy.replace(path)
        await eventually(lambda: world.serving == 2)
        assert world.value("refused_versions_total", reason="corrupt") == 1

    run(world, test)


def test_what_was_worse_than_a_version_serves_once_that_one_is_refused(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)

    async def test() -> None:
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: world.value("refused_versions_total", reason="worse") == 1)
        assert (await world.manager.statuses())[1].state is State.REFUSED
        assert await world.manager.roll_back() == 2
        await eventually(lambda: world.serving == 2)
        one, two = await world.manager.statuses()
        assert (one.state, two.state, two.reason) == (State.REFUSED, State.SERVING, "")

    run(world, test)


def test_what_was_worse_than_a_version_serves_after_a_restart_without_that_one(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)
    decisions = world.registry.decisions

    async def refuse() -> None:
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: any(each.refusal for each in decisions.findings().get(2, ())))

    run(world, refuse)
    world.registry.remove_version(1)
    restarted = World(world.registry.root)

    async def test() -> None:
        await eventually(lambda: restarted.serving == 2)

    run(restarted, test)


def test_after_a_restart_nothing_is_worse_than_a_version_that_cannot_be_read(world: World) -> None:
    publish_tiny_version(world.registry, 2.0, seed=BAD_SEED)
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)

    async def serve() -> None:
        await eventually(lambda: world.serving == 2)

    run(world, serve)
    path = world.registry.version_directory(2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    restarted = World(world.registry.root)

    async def test() -> None:
        await eventually(lambda: restarted.serving == 1)

    run(restarted, test)


def test_a_version_that_claims_a_better_loss_than_it_has_is_refused(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    claims_too_much = publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async def test() -> None:
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        await eventually(lambda: world.serving == 1)
        two = (await world.manager.statuses())[1]
        assert two.loss == pytest.approx(claims_too_much.claimed_loss + 0.1, abs=1e-4)
        assert two.reason.startswith("loss_mismatch: it claims a held-out loss of")

    run(world, test)


def test_a_version_that_is_worse_than_the_one_that_serves_does_not_take_its_place(world: World) -> None:
    async def test() -> None:
        publish_tiny_version(world.registry, 2.0, seed=GOOD_SEED)
        await eventually(lambda: world.serving == 1)
        # Its manifest says that it is better; measured on the same windows it is not.
        worse = publish_tiny_version(world.registry, 1.0, seed=BAD_SEED)
        assert worse.claimed_loss > world.registry.version(1).claimed_loss + 0.05
        await eventually(lambda: world.value("refused_versions_total", reason="worse") == 1)
        assert world.serving == 1
        # On another evaluation set losses do not compare.
        publish_tiny_version(world.registry, 9.0, seed=BAD_SEED, evaluation_set="another")
        await eventually(lambda: world.serving == 3)

    run(world, test)


def test_a_worse_version_can_still_be_had_by_its_number(world: World) -> None:
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)
    worse = publish_tiny_version(world.registry, 2.0, seed=BAD_SEED)

    async def test() -> None:
        await eventually(lambda: world.serving == 1)
        async with world.residents.stream(worse) as resident:
            assert resident.manifest == worse
        await world.manager.set_policy("pinned:2")
        await eventually(lambda: world.serving == 2)

    run(world, test)


def test_what_was_found_out_is_remembered_after_a_restart(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    good = publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async def judged() -> None:
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: len(world.registry.decisions.findings()) == 2)

    run(world, judged)
    monkeypatch.setattr(CpuDecoder, "score", lambda *_: pytest.fail("It is examined again."))
    restarted = World(world.registry.root)

    async def test() -> None:
        await eventually(lambda: restarted.serving == 1)
        await polls(restarted)
        assert restarted.serving == 1
        assert restarted.value("refused_versions_total", reason="loss_mismatch") == 0
        first, second = await restarted.manager.statuses()
        assert first.loss == pytest.approx(good.claimed_loss, abs=1e-4)
        assert second.reason.startswith("loss_mismatch")

    run(restarted, test)


def test_what_another_kind_of_device_found_out_does_not_count(world: World) -> None:
    publish_tiny_version(world.registry, 1.0)
    decisions = world.registry.decisions

    async def judged() -> None:
        await eventually(lambda: bool(decisions.findings()))

    run(world, judged)
    (finding,) = decisions.findings()[1]
    elsewhere = replace(finding, device="metal", refusal="loss_mismatch", sentence="it lies", at=finding.at + 1)
    decisions.keep(1, elsewhere)
    decisions.forget(2)
    restarted = World(world.registry.root)

    async def test() -> None:
        await eventually(lambda: restarted.serving == 1)
        assert elsewhere in decisions.findings()[1]

    run(restarted, test)


def test_what_was_refused_is_not_asked_for_into_serving_while_a_server_begins(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    refused = publish_tiny_version(world.registry, 1.0)

    async def roll_back() -> None:
        await eventually(lambda: world.serving == 2)
        await world.manager.roll_back()
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: any(finding.refusal for finding in world.registry.decisions.findings()[2]))

    run(world, roll_back)
    restarted = World(world.registry.root)

    async def test() -> None:
        # Before it has looked at the registry at all.
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            async with restarted.residents.stream(refused):
                pass
        await eventually(lambda: restarted.serving == 1)

    run(restarted, test)


def test_a_version_that_came_while_no_server_ran_must_be_as_good_as_what_served_before(world: World) -> None:
    publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)

    async def serve() -> None:
        await eventually(lambda: world.serving == 1)
        await eventually(lambda: bool(world.registry.decisions.findings()))

    run(world, serve)
    publish_tiny_version(world.registry, 0.5, seed=BAD_SEED)
    restarted = World(world.registry.root)

    async def test() -> None:
        await eventually(lambda: restarted.serving == 1)
        assert restarted.value("refused_versions_total", reason="worse") == 1

    run(restarted, test)


def test_a_version_with_held_out_windows_of_its_own_does_not_compare(world: World) -> None:
    publish_tiny_version(world.registry, 1.0)

    async def test() -> None:
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 0.5, windows=(1, 20))
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        assert "has other held-out windows" in (await world.manager.statuses())[1].reason
        assert world.serving == 1

    run(world, test)


def tear_manifest(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text()[:-100])


def odd_manifest(name: str, value: object) -> Callable[[Path], None]:
    """Lets a manifest hold a value, and the hash of what it holds then."""

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
def test_a_version_whose_manifest_cannot_be_understood_is_listed_as_refused(
    world: World, damage: Callable[[Path], None]
) -> None:
    publish_tiny_version(world.registry, 1.0)

    async def test() -> None:
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

    run(world, test)


def test_a_refused_version_is_examined_again_when_it_is_asked_for(world: World) -> None:
    publish_tiny_version(world.registry, 2.0)
    publish_tiny_version(world.registry, 1.0, better_by=0.1)

    async def test() -> None:
        await eventually(lambda: world.value("refused_versions_total", reason="loss_mismatch") == 1)
        with pytest.raises(FailedPrecondition, match="claims a held-out loss"):
            await world.manager.load(2)
        assert world.value("refused_versions_total", reason="loss_mismatch") == 2
        await eventually(lambda: world.serving == 1)

    run(world, test)


def test_a_version_that_cannot_be_read_now_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
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

    async def test() -> None:
        nonlocal failing
        await eventually(lambda: world.serving == 1)
        two = (await world.manager.statuses())[1]
        assert "Input/output error" in two.reason and "tried again" in two.reason
        failing = False
        await eventually(lambda: world.serving == 2)
        assert world.value("refused_versions_total", reason="corrupt") == 0

    run(world, test)


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), RuntimeError("unable to allocate")])
def test_what_a_whole_file_does_not_yield_is_no_refusal(
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

    async def test() -> None:
        await eventually(lambda: world.serving == 1)
        assert world.value("refused_versions_total", reason="unfit") == 0

    run(world, test)
    assert next(failing, None) is None
