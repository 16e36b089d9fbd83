"""Serving the versions that the registry and operators choose, with a real engine and tiny versions."""

import asyncio
import logging
from pathlib import Path

import pytest

from inference_service.versions.planner import State
from shared.atomic_file import replacing
from shared.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from shared.registry.registry import Checkpoint
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import BAD_SEED, flip_a_bit, no_tokenizer
from tests.inference_service.world import World, drop, hold_read, polls, served, status
from tests.registries import root_of
from tests.waiting import eventually

pytestmark = pytest.mark.slow


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


async def answer(world: World) -> int:
    """Returns the version that answers calls that name none."""
    async with world.residents.stream(None) as resident:
        return resident.manifest.version


@async_test
async def test_requests_wait_for_a_version_that_is_about_to_serve(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hold_read(monkeypatch, 1)

    async with fresh.running():
        # The server has not looked since it was published.
        publish_tiny_version(fresh.registry, 1.0)
        waiting = [asyncio.create_task(answer(fresh)) for _ in range(5)]
        await eventually(reading.entered.is_set)
        await polls(fresh)
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        reading.go_on.set()
        assert await asyncio.gather(*waiting[1:]) == [1] * 4


@async_test
async def test_waiting_requests_fail_with_the_reason_why_no_version_serves(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = hold_read(monkeypatch, 1)

    async with fresh.running():
        publish_tiny_version(fresh.registry, 1.0, change=no_tokenizer)
        waiting = asyncio.create_task(answer(fresh))
        await eventually(reading.entered.is_set)
        reading.go_on.set()
        with pytest.raises(Unavailable, match="No version can serve: version 1 was refused, as unfit: "):
            await waiting


@async_test
async def test_only_some_requests_wait_for_a_first_version(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = hold_read(monkeypatch, 1)

    async with fresh.running():
        publish_tiny_version(fresh.registry, 1.0)
        waiting = [asyncio.create_task(answer(fresh)) for _ in range(16)]
        await eventually(reading.entered.is_set)
        await polls(fresh)
        with pytest.raises(ResourceExhausted, match="16 requests wait"):
            await answer(fresh)
        reading.go_on.set()
        assert await asyncio.gather(*waiting) == [1] * 16


@async_test
async def test_after_a_restart_requests_fail_with_the_reason_why_no_version_serves(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0, change=no_tokenizer)
    publish_tiny_version(fresh.registry, 1.0, better_by=0.5)
    fresh.registry.decisions.set_policy("pinned:7")

    async with fresh.running():
        await eventually(lambda: len(fresh.registry.decisions.findings()) == 2)
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        with pytest.raises(Unavailable) as error:
            await answer(restarted)
        assert str(error.value).startswith(
            "No version can serve: versions 1 to 2 were refused, the last one as loss_mismatch: it claims a held-out "
            "loss of"
        )
        assert str(error.value).endswith(" The policy is 'pinned:7', which names no version.")


@async_test
async def test_a_damaged_policy_is_reported_once_while_the_one_before_holds(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    path = root_of(world.registry) / "serving" / "policy"

    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.set_policy("pinned:1")
        await eventually(lambda: world.serving == 1)
        write_whole(path, "newest")
        await polls(world, 10)
        assert (world.serving, world.catalogue.policy) == (1, "pinned:1")
        (notice,) = world.catalogue.notices
        assert notice.startswith("The policy stays pinned:1: ") and "'newest' is not a label" in notice
        assert caplog.text.count(notice) == 1
        write_whole(path, "newer")
        await polls(world, 10)
        assert caplog.text.count("The policy stays") == 2
        # Everything else goes on.
        await world.manager.promote(3)
        assert "stable" in (await status(world, 3)).labels
        write_whole(path, "stable")
        await eventually(lambda: world.serving == 3)
        assert world.catalogue.notices == []


@async_test
async def test_the_best_version_serves_as_it_changes(fresh: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async with fresh.running():
        with pytest.raises(Unavailable):
            async with fresh.residents.stream(None):
                pass
        publish_tiny_version(fresh.registry, 2.0)
        await eventually(lambda: fresh.serving == 1)
        publish_tiny_version(fresh.registry, 3.0)
        publish_tiny_version(fresh.registry, 1.0)
        await eventually(lambda: fresh.serving == 3)
        assert served(caplog) == [1, 3]
        assert fresh.value("swaps_total") == 1


@async_test
async def test_a_version_with_a_changed_file_is_refused_once_and_the_one_before_stays(
    fresh: World, caplog: pytest.LogCaptureFixture
) -> None:
    async with fresh.running():
        publish_tiny_version(fresh.registry, 2.0)
        await eventually(lambda: fresh.serving == 1)
        bad = drop(fresh.registry, flip_a_bit)
        await eventually(lambda: fresh.value("refused_versions_total", reason="corrupt") == 1)
        await polls(fresh)
        assert fresh.serving == 1
        with pytest.raises(FailedPrecondition, match=r"Version 2 cannot serve: .* SHA-256"):
            async with fresh.residents.stream(bad):
                pass
        publish_tiny_version(fresh.registry, 1.5)
        await eventually(lambda: fresh.serving == 3)
        assert fresh.value("refused_versions_total", reason="corrupt") == 1
    assert sum("is refused" in record.getMessage() for record in caplog.records) == 1


@async_test
async def test_the_next_best_version_serves_if_the_best_is_unfit_at_the_start(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 3.0)
    publish_tiny_version(fresh.registry, 2.0)
    unfit = publish_tiny_version(fresh.registry, 1.0, change=no_tokenizer)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)
        assert fresh.value("refused_versions_total", reason="unfit") == 1
        with pytest.raises(FailedPrecondition, match="Version 3 cannot serve"):
            async with fresh.residents.stream(unfit):
                pass


@async_test
async def test_a_version_that_disappears_is_not_refused(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0)
    gone = publish_tiny_version(fresh.registry, 2.0)
    fresh.registry.remove(Checkpoint(2))

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        with pytest.raises(NotFound, match="was removed"):
            async with fresh.residents.stream(gone):
                pass
        assert fresh.value("refused_versions_total", reason="corrupt") == 0


@async_test
async def test_a_version_that_is_ready_serves_while_a_better_one_is_on_its_way(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise versions that come faster than they are examined would never serve."""
    reading = hold_read(monkeypatch, 4)

    async with world.running():
        await eventually(lambda: world.serving == 2)
        publish_tiny_version(world.registry, 0.5)
        await eventually(reading.entered.is_set)
        publish_tiny_version(world.registry, 0.4)
        await polls(world)
        reading.entered.clear()
        reading.go_on.set()
        await eventually(lambda: world.serving == 5)
    assert world.value("swaps_total") == 2


@async_test
async def test_another_registry_in_the_same_place_takes_over(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        moved = root_of(world.registry).with_name("moved")
        root_of(world.registry).rename(moved)
        await polls(world)
        assert world.serving == 2
        for _ in range(2):
            publish_tiny_version(world.registry, 9.0, seed=3)
        new = world.registry.version(2)
        await eventually(lambda: world.manager.serving is not None and world.manager.serving.manifest == new)


@async_test
async def test_the_server_can_end_in_the_middle_of_an_examination(tmp_path: Path) -> None:
    world = World(tmp_path / "registry")
    publish_tiny_version(world.registry, 1.0, windows=(400, 90))

    async with world.running():
        await eventually(lambda: bool(world.engine._arriving))
    assert world.serving is None


@async_test
async def test_a_pin_holds_until_a_label_is_followed_again(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.set_policy("pinned:1")
        await eventually(lambda: world.serving == 1)
        publish_tiny_version(world.registry, 0.5)
        await polls(world)
        assert world.serving == 1
        assert (await status(world, 1)).labels == ("pinned:1",)
        await world.manager.set_policy("latest")
        await eventually(lambda: world.serving == 4)
        await world.manager.set_policy("best")
        await polls(world)
        assert world.serving == 4


@async_test
async def test_the_policy_is_kept_over_a_restart(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.set_policy("pinned:1")
        await eventually(lambda: world.serving == 1)
    restarted = World(root_of(world.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving is not None)
        assert restarted.serving == 1


@async_test
async def test_a_run_can_be_followed_and_named(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        with pytest.raises(NotFound, match="of the run 'other'"):
            await world.manager.set_policy("run:other")
        publish_tiny_version(world.registry, 4.0, run="other", evaluation_set="other text")
        await world.manager.set_policy("run:other")
        await eventually(lambda: world.serving == 4)
        publish_tiny_version(world.registry, 0.5)
        publish_tiny_version(world.registry, 3.5, run="other", evaluation_set="other text")
        await eventually(lambda: world.serving == 6)
        assert "run:other" in (await status(world, 6)).labels
        named = await world.catalogue.resolve("run:tiny")
        assert named is not None and named.version == 5


@async_test
async def test_the_stable_version_is_the_promoted_one(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        with pytest.raises(FailedPrecondition, match="No version is stable yet"):
            await world.manager.set_policy("stable")
        await world.manager.promote(3)
        assert world.serving == 2
        manifest = await world.catalogue.resolve("stable")
        assert manifest is not None and manifest.version == 3
        await world.manager.set_policy("stable")
        await eventually(lambda: world.serving == 3)
        await world.manager.promote(1)
        await eventually(lambda: world.serving == 1)


@async_test
async def test_a_version_that_does_not_exist_or_was_refused_cannot_be_chosen(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        await world.manager.roll_back()
        with pytest.raises(InvalidArgument, match="is not a label"):
            await world.manager.set_policy("newest")
        for label, kind in (("pinned:9", NotFound), ("pinned:2", FailedPrecondition)):
            with pytest.raises(kind):
                await world.manager.set_policy(label)
        with pytest.raises(NotFound):
            await world.manager.promote(9)
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            await world.manager.promote(2)
        assert world.catalogue.policy == "best"


@async_test
async def test_a_worse_version_that_an_operator_loads_can_be_pinned(world: World) -> None:
    async with world.running():
        await eventually(lambda: world.serving == 2)
        publish_tiny_version(world.registry, 0.5, seed=BAD_SEED)
        await eventually(lambda: world.value("refused_versions_total", reason="worse") == 1)
        await world.manager.load(4)
        await polls(world)
        assert (world.serving, (await status(world, 4)).state) == (2, State.RESIDENT)
        await world.manager.set_policy("pinned:4")
        await eventually(lambda: world.serving == 4)
