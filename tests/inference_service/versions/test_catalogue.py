"""What a server knows of versions: their files, manifests, and findings, also after a restart."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from inference_service.grpc.translate import status_to_pb
from inference_service.versions.planner import State
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.weight_format import DEFAULT_WEIGHTS, WeightFormat
from shared.errors import FailedPrecondition, Unavailable
from shared.gpt.operations import on_cpu
from shared.registry.decisions import BestBy
from shared.registry.findings import Finding
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.spoiling import BAD_SEED, GOOD_SEED, cut_off, lose_a_file
from tests.inference_service.world import World, drop, polls
from tests.records import write_record
from tests.registries import disk_registry, evaluation_folder, root_of, version_folder
from tests.waiting import eventually

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("change", [cut_off, lose_a_file])
@async_test
async def test_a_version_with_missing_or_short_files_waits(fresh: World, change: Callable[[Path], None]) -> None:
    async with fresh.running():
        publish_tiny_version(fresh.registry, 2.0)
        await eventually(lambda: fresh.serving == 1)
        manifest = drop(fresh.registry, change)
        await polls(fresh)
        two = (await fresh.manager.statuses())[1]
        assert (two.state, two.labels) == (State.WAITING, ())
        assert two.reason.startswith("Version 2 waits for its files: ")
        with pytest.raises(Unavailable, match="Version 2 waits for its files"):
            async with fresh.residents.stream(manifest):
                pass
        with pytest.raises(Unavailable, match="Version 2 waits for its files"):
            await fresh.manager.set_policy("pinned:2")
        assert fresh.serving == 1
        assert fresh.registry.decisions.findings().keys() == {1}


@async_test
async def test_while_the_registry_cannot_be_read_the_versions_of_the_last_look_count(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    root = root_of(fresh.registry)
    # A link can be replaced at once.
    aside = root.rename(root.with_name("aside"))
    root.symlink_to(aside)
    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        before = await fresh.catalogue.manifest(1)
        loop = root.with_name("loop")
        loop.symlink_to(root)
        # Every operation fails now, as on a file system that is gone.
        loop.replace(root)
        assert await fresh.catalogue.manifest(1) == before
        with pytest.raises(Unavailable, match="The registry cannot be read: Too many levels"):
            await fresh.catalogue.manifest(2)


@async_test
async def test_a_version_that_is_copied_file_by_file_serves_once_it_is_whole(fresh: World) -> None:
    staged = disk_registry(root_of(fresh.registry).parent / "staged")
    publish_tiny_version(staged, 1.0)
    source, target = version_folder(staged, 1), version_folder(fresh.registry, 1)

    async with fresh.running():
        target.mkdir(parents=True)
        await polls(fresh)
        (copied,) = await fresh.manager.statuses()
        assert (copied.state, copied.manifest) == (State.WAITING, None)
        # The manifest first, and each file in two pieces.
        for path in sorted(source.iterdir(), key=lambda path: path.name != "manifest.json"):
            content = path.read_bytes()
            for piece in (content[: len(content) // 2], content):
                (target / path.name).write_bytes(piece)
                await polls(fresh)
        await eventually(lambda: fresh.serving == 1)
        await eventually(lambda: bool(fresh.registry.decisions.findings()))
    assert [each.refusal for each in fresh.registry.decisions.findings()[1]] == [None]


@async_test
async def test_findings_are_remembered_after_a_restart(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    good = publish_tiny_version(fresh.registry, 2.0)
    publish_tiny_version(fresh.registry, 1.0, better_by=0.1)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        await eventually(lambda: len(fresh.registry.decisions.findings()) == 2)
    monkeypatch.setattr(CpuDecoder, "score", lambda *_: pytest.fail("It is examined again."))
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        await polls(restarted)
        assert restarted.serving == 1
        assert restarted.value("refused_versions_total", reason="loss_mismatch") == 0
        first, second = await restarted.manager.statuses()
        # int8 changes the loss of this model by 0.003.
        assert first.loss == pytest.approx(good.claimed_loss, abs=5e-3)
        assert second.reason.startswith("loss_mismatch")


@pytest.mark.skipif(not on_cpu(), reason="The format is chosen on a CPU.")
@async_test
async def test_a_version_is_examined_again_in_another_format(fresh: World) -> None:
    good = publish_tiny_version(fresh.registry, 2.0)
    async with fresh.running():
        await eventually(lambda: len(fresh.registry.decisions.findings()) == 1)
    plain = World(root_of(fresh.registry), weights=WeightFormat.FP32)
    async with plain.running():
        await eventually(lambda: plain.serving == 1)
        await eventually(lambda: len(plain.registry.decisions.findings()[1]) == 2)
    losses = {each.device: each.loss for each in plain.registry.decisions.findings()[1]}
    assert set(losses) == {f"cpu_{DEFAULT_WEIGHTS}", "cpu_fp32"}
    assert losses["cpu_fp32"] == pytest.approx(good.claimed_loss, abs=1e-4) != losses[f"cpu_{DEFAULT_WEIGHTS}"]


@async_test
async def test_a_finding_with_an_earlier_name_of_its_reason_still_counts(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    claims_too_much = publish_tiny_version(fresh.registry, 1.0)
    sentence = "it claims too much"
    fresh.registry.decisions.keep(
        2, Finding(claims_too_much.digest, f"cpu_{DEFAULT_WEIGHTS}", 3.5, "lying", sentence, at=1.0)
    )
    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        with pytest.raises(FailedPrecondition, match=f"Version 2 cannot serve: {sentence}"):
            async with fresh.residents.stream(claims_too_much):
                pass
        two = (await fresh.manager.statuses())[1]
        assert (two.state, two.reason, two.loss) == (State.REFUSED, f"lying: {sentence}", 3.5)


@async_test
async def test_a_rollback_counts_for_a_server_that_examines_the_version_meanwhile(fresh: World) -> None:
    manifest = publish_tiny_version(fresh.registry, 2.0)
    other = World(root_of(fresh.registry))
    for each in (fresh, other):
        await each.catalogue.look()
    began = fresh.catalogue.looked_at
    await other.catalogue.roll_back(manifest, 2.0, "an operator rolled it back", None)
    fresh.catalogue.accept(manifest, 2.0, began)
    fresh.catalogue._writer.submit(lambda: None).result()
    for each in (fresh, other):
        await each.catalogue.look()
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            each.catalogue.check_may_serve(manifest)


@async_test
async def test_findings_of_another_kind_of_device_do_not_count(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0)
    decisions = fresh.registry.decisions

    async with fresh.running():
        await eventually(lambda: bool(decisions.findings()))
    (finding,) = decisions.findings()[1]
    elsewhere = replace(finding, device="metal", refusal="loss_mismatch", sentence="it lies", at=finding.at + 1)
    decisions.keep(1, elsewhere)
    decisions.forget(2)
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        await eventually(lambda: restarted.serving == 1)
        assert elsewhere in decisions.findings()[1]


@async_test
async def test_a_refused_version_cannot_be_named_while_a_server_starts(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 2.0)
    refused = publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 2)
        await fresh.manager.roll_back()
        await eventually(lambda: fresh.serving == 1)
        await eventually(lambda: any(finding.refusal for finding in fresh.registry.decisions.findings()[2]))
    restarted = World(root_of(fresh.registry))

    async with restarted.running():
        # The server has not looked at the registry yet.
        with pytest.raises(FailedPrecondition, match="an operator rolled it back"):
            async with restarted.residents.stream(refused):
                pass
        await eventually(lambda: restarted.serving == 1)


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
    fresh: World, damage: Callable[[Path], None]
) -> None:
    publish_tiny_version(fresh.registry, 1.0)

    async with fresh.running():
        await eventually(lambda: fresh.serving == 1)
        drop(fresh.registry, damage)
        await eventually(lambda: fresh.value("refused_versions_total", reason="corrupt") == 1)
        one, two = await fresh.manager.statuses()
        assert (one.number, one.state) == (1, State.SERVING)
        assert (two.number, two.state, two.manifest) == (2, State.REFUSED, None)
        assert two.reason.startswith("corrupt: ")
        assert len(status_to_pb(two).reason) < 1000
        await polls(fresh)
        assert fresh.value("refused_versions_total", reason="corrupt") == 1


@async_test
async def test_a_record_is_shown_as_soon_as_it_appears(world: World) -> None:
    async with world.running(serving=2):
        assert [each.evaluation for each in await world.manager.statuses()] == [None, None, None]
        assert evaluated(world) == {}
        write_record(world.registry, world.registry.version(2), 1.5)
        await eventually(lambda: evaluated(world) == {("2", "aa"): 1.5})
        write_record(world.registry, world.registry.version(2), 1.4)
        await eventually(lambda: evaluated(world) == {("2", "aa"): 1.4})
        write_record(world.registry, world.registry.version(3), 1.2, "bb", 200.0)
        await eventually(lambda: world.catalogue.evaluation(3) is not None)
        # It is of another version than the serving one.
        assert evaluated(world) == {("2", "aa"): 1.4}
        statuses = await world.manager.statuses()
        assert [each.evaluation and each.evaluation.bits_per_byte for each in statuses] == [None, 1.4, 1.2]
        assert world.serving == 2
        (evaluation_folder(world.registry, 2) / "aa.json").unlink()
        await eventually(lambda: evaluated(world) == {})


def evaluated(world: World) -> dict[tuple[str, str], float]:
    """Returns the bits per byte on the metrics page, by the version and the method."""
    return {
        (sample.labels["version"], sample.labels["method"]): sample.value
        for family in world.collectors.collect()
        if family.name == "gptloop_inference_evaluated_bits_per_byte"
        for sample in family.samples
    }


@async_test
async def test_the_version_with_the_best_evaluation_serves_whatever_its_windows_say(tmp_path: Path) -> None:
    world = World(tmp_path / "registry", BestBy.EVALUATION)
    first = publish_tiny_version(world.registry, 1.0, seed=GOOD_SEED)
    second = publish_tiny_version(world.registry, 2.0, seed=BAD_SEED)
    async with world.running(serving=1):
        assert "No version has an evaluation yet" in world.catalogue.notices[0]
        write_record(world.registry, second, 1.5)
        await world.serves(2)
        assert world.catalogue.labels()["best"] == 2
        write_record(world.registry, first, 1.4)
        await world.serves(1)
        write_record(world.registry, first, 1.6)
        await world.serves(2)
        # A version without an evaluation by that method does not take over.
        publish_tiny_version(world.registry, 0.5)
        await eventually(lambda: "Version 3 has no evaluation" in "".join(world.catalogue.notices))
        await polls(world)
        assert world.serving == 2
        assert world.value("refused_versions_total", reason="worse") == 0
        # Without the only version that was evaluated, the best one of training serves.
        (evaluation_folder(world.registry, 1) / "aa.json").unlink()
        assert await world.manager.roll_back() in (1, 3)
        await world.serves(3)
