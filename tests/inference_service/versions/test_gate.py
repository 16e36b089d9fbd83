"""Versions that may serve and versions that must not, examined by a real engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_service.versions import gate
from inference_service.versions.planner import State
from shared import version_format
from shared.errors import CorruptCheckpoint, FailedPrecondition, StoreFailed
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Checkpoint
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import (
    BAD_SEED,
    GOOD_SEED,
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
from tests.inference_service.world import World, drop, polls
from tests.registries import root_of, version_folder
from tests.waiting import eventually

pytestmark = pytest.mark.slow


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
    fresh: World, change: Callable[[Path], None], reason: str, sentence: str
) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    bad = publish_tiny_version(fresh.registry, 1.0, change=change)

    async with fresh.running():
        await eventually(lambda: fresh.value("refused_versions_total", reason=reason) == 1)
        await eventually(lambda: fresh.serving == 1)
        with pytest.raises(FailedPrecondition, match=f"Version 2 cannot serve: .*{sentence}"):
            async with fresh.residents.stream(bad):
                pass
        await polls(fresh)
        assert fresh.value("refused_versions_total", reason=reason) == 1
        assert fresh.resident() == {"1"}
        # Nothing is left of the examined version.
        await eventually(lambda: set(fresh.engine._lanes) == {1})


@async_test
async def test_a_version_changed_after_its_commit_never_serves(fresh: World) -> None:
    async with fresh.running():
        publish_tiny_version(fresh.registry, 2.0)
        await eventually(lambda: fresh.serving == 1)
        drop(fresh.registry, flip_a_bit)
        await eventually(lambda: fresh.value("refused_versions_total", reason="corrupt") == 1)
        await polls(fresh)
        assert fresh.serving == 1


@async_test
async def test_a_corrupt_version_is_examined_again_once_its_files_are_restored(fresh: World, tmp_path: Path) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    publish_tiny_version(fresh.registry, 1.0)
    path = version_folder(fresh.registry, 2) / "model.safetensors"
    whole = path.read_bytes()
    flip_a_bit(path.parent)

    async with fresh.running():
        await eventually(lambda: fresh.value("refused_versions_total", reason="corrupt") == 1)
        await eventually(lambda: fresh.serving == 1)
        await polls(fresh)
        assert (await fresh.manager.statuses())[1].reason.startswith("corrupt: ")
        copy = tmp_path / "copy"
        copy.write_bytes(whole)
        copy.replace(path)
        await eventually(lambda: fresh.serving == 2)
        assert fresh.value("refused_versions_total", reason="corrupt") == 1


@async_test
async def test_a_worse_version_serves_once_the_better_one_is_refused(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0, seed=GOOD_SEED)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        publish_tiny_version(fresh.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: fresh.value("refused_versions_total", reason="worse") == 1)
        assert (await fresh.manager.statuses())[1].state is State.REFUSED
        assert await fresh.manager.roll_back() == 2
        await eventually(lambda: fresh.serving == 2)
        one, two = await fresh.manager.statuses()
        assert (one.state, two.state, two.reason) == (State.REFUSED, State.SERVING, "")


@async_test
async def test_a_worse_version_serves_after_a_restart_without_the_better_one(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0, seed=GOOD_SEED)
    decisions = fresh.registry.decisions

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        publish_tiny_version(fresh.registry, 1.0, seed=BAD_SEED)
        await eventually(lambda: any(each.refusal for each in decisions.findings().get(2, ())))
    fresh.registry.remove(Checkpoint(1))
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving == 2)


@async_test
async def test_after_a_restart_an_unreadable_version_sets_no_standard(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0, seed=BAD_SEED)
    publish_tiny_version(fresh.registry, 1.0, seed=GOOD_SEED)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)
    path = version_folder(fresh.registry, 2) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)


@async_test
async def test_a_version_that_claims_a_better_loss_than_it_has_is_refused(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    claims_too_much = publish_tiny_version(fresh.registry, 1.0, better_by=0.1)

    async with fresh.running():
        await eventually(lambda: fresh.value("refused_versions_total", reason="loss_mismatch") == 1)
        await eventually(lambda: fresh.serving == 1)
        two = (await fresh.manager.statuses())[1]
        # int8 changes the loss of this model by 0.003.
        assert two.loss == pytest.approx(claims_too_much.claimed_loss + 0.1, abs=5e-3)
        assert two.reason.startswith("loss_mismatch: it claims a held-out loss of")


@async_test
async def test_a_version_worse_than_the_serving_one_does_not_replace_it(fresh: World) -> None:
    async with fresh.running():
        publish_tiny_version(fresh.registry, 2.0, seed=GOOD_SEED)
        await eventually(lambda: fresh.serving == 1)
        # Its manifest says that it is better; measured on the same windows it is not.
        worse = publish_tiny_version(fresh.registry, 1.0, seed=BAD_SEED)
        assert worse.claimed_loss > fresh.registry.version(1).claimed_loss + 0.05
        await eventually(lambda: fresh.value("refused_versions_total", reason="worse") == 1)
        assert fresh.serving == 1
        # Losses on different evaluation sets do not compare.
        publish_tiny_version(fresh.registry, 9.0, seed=BAD_SEED, evaluation_set="another")
        await eventually(lambda: fresh.serving == 3)


@async_test
async def test_a_worse_version_can_still_be_named_by_its_number(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0, seed=GOOD_SEED)
    worse = publish_tiny_version(fresh.registry, 2.0, seed=BAD_SEED)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        async with fresh.residents.stream(worse) as resident:
            assert resident.manifest == worse
        await fresh.manager.set_policy("pinned:2")
        await eventually(lambda: fresh.serving == 2)


@async_test
async def test_a_version_published_while_no_server_ran_must_be_as_good_as_the_one_before(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0, seed=GOOD_SEED)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        await eventually(lambda: bool(fresh.registry.decisions.findings()))
    publish_tiny_version(fresh.registry, 0.5, seed=BAD_SEED)
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        assert restarted.value("refused_versions_total", reason="worse") == 1


@async_test
async def test_a_version_with_other_held_out_windows_is_refused(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        publish_tiny_version(fresh.registry, 0.5, windows=(1, 20))
        await eventually(lambda: fresh.value("refused_versions_total", reason="loss_mismatch") == 1)
        assert "has other held-out windows" in (await fresh.manager.statuses())[1].reason
        assert fresh.serving == 1


@async_test
async def test_a_refused_version_is_examined_again_when_an_operator_loads_it(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    publish_tiny_version(fresh.registry, 1.0, better_by=0.1)

    async with fresh.running():
        await eventually(lambda: fresh.value("refused_versions_total", reason="loss_mismatch") == 1)
        with pytest.raises(FailedPrecondition, match="claims a held-out loss"):
            await fresh.manager.load(2)
        assert fresh.value("refused_versions_total", reason="loss_mismatch") == 2
        await eventually(lambda: fresh.serving == 1)


@async_test
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreFailed("Input/output error.")], ids=repr)
async def test_a_version_that_cannot_be_read_is_tried_again(
    fresh: World, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    publish_tiny_version(fresh.registry, 1.0)
    verified = fresh.registry.verified
    failing = True

    def unreadable(manifest: VersionManifest) -> Path:
        if failing and manifest.version == 2:
            raise error
        return verified(manifest)

    monkeypatch.setattr(fresh.registry, "verified", unreadable)
    monkeypatch.setattr("inference_service.versions.entry.RETRY_AFTER_S", 0.2)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        await eventually(lambda: "tried again" in fresh.manager._statuses()[1].reason)
        assert "Input/output error" in (await fresh.manager.statuses())[1].reason
        failing = False
        await eventually(lambda: fresh.serving == 2)
        assert fresh.value("refused_versions_total", reason="corrupt") == 0


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), RuntimeError("unable to allocate")])
@async_test
async def test_an_error_of_the_disk_or_of_memory_refuses_no_version(
    fresh: World, monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    publish_tiny_version(fresh.registry, 1.0)
    read = version_format.read_model
    failing = iter([True])

    def fail_once(*arguments: Any) -> Any:
        if next(failing, False):
            raise CorruptCheckpoint("it cannot be read") from cause
        return read(*arguments)

    monkeypatch.setattr(gate, "read_model", fail_once)
    monkeypatch.setattr("inference_service.versions.entry.RETRY_AFTER_S", 0.1)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        assert fresh.value("refused_versions_total", reason="unfit") == 0
    assert next(failing, None) is None
