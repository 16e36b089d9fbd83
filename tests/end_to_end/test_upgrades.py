"""Registries that earlier code has written are read, served and continued, and those of newer code are left alone."""

import json
import shutil
from pathlib import Path

import pytest

from shared.errors import NewerFormat
from shared.registry import manifest as manifest_module
from shared.registry.manifest import FORMAT, MANIFEST_NAME, StateManifest, VersionManifest
from shared.registry.registry import Checkpoint
from shared.registry.retention import Retention, prune
from tests.inference_service.process import Server
from tests.registries import state_folder, version_folder
from tests.trainer_service.site import Site
from tests.waiting import wait_until
from trainer_service.jobs.requests import TrainRequest

REGISTRIES = Path(__file__).parents[1] / "data" / "registries"


@pytest.fixture(params=["before_histories", "format_1"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Site:
    shutil.copytree(REGISTRIES / request.param, tmp_path / "var" / "registry")
    return Site(tmp_path)


def test_an_older_registry_is_read_and_its_version_continued(site: Site) -> None:
    registry = site.registry
    (version,) = registry.versions()
    assert registry.checkpoints() == [Checkpoint(1), Checkpoint(4, "old")] and registry.store.unknown() == []
    for checkpoint in registry.checkpoints():
        registry.check(checkpoint)
    assert registry.labels() == {"latest": 1, "best": 1}
    # Its digest, by which findings and evaluations name it, stays the same.
    assert json.loads(version.to_json()) == json.loads((version_folder(registry, 1) / MANIFEST_NAME).read_text())
    spec = TrainRequest(dataset=(site.text,), resume=1, overrides={"max_steps": "6"}).resolve(registry)
    assert site.train(spec)
    assert (registry.versions()[-1].parent, registry.versions()[-1].step) == (1, 6)


@pytest.mark.slow
def test_an_older_registry_is_served(site: Site) -> None:
    server = Server(site.directories.var)
    try:
        wait_until(server.serves)
        with server.client() as client:
            # The gate has compared the loss of the version with the one that its manifest claims.
            assert "".join(client.generate("Once", max_tokens=5, temperature=0).text())
    finally:
        server.end()


def make_newer(directory: Path, kind: type[VersionManifest] | type[StateManifest]) -> None:
    """Rewrites a manifest as a newer gptloop would write it."""
    manifest = kind.read(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT", FORMAT + 1)
        manifest.__dict__.pop("digest", None)
        text = manifest.to_json()
    assert json.loads(text)["format"] == FORMAT + 1
    (directory / MANIFEST_NAME).write_text(text)


def test_a_newer_version_is_named_and_neither_read_nor_removed(site: Site) -> None:
    registry = site.registry
    make_newer(version_folder(registry, 1), VersionManifest)
    assert registry.versions() == []
    sentence = (
        f"{version_folder(registry, 1) / MANIFEST_NAME} was written by a newer gptloop: its format is {FORMAT + 1}, "
        f"and this one reads formats up to {FORMAT}. Upgrade this one."
    )
    assert registry.unreadable == {1: sentence}
    for call in (lambda: registry.version(1), lambda: prune(registry, Retention(newest=1, best=0, runs=1))):
        with pytest.raises(NewerFormat) as raised:
            call()
        assert str(raised.value) == sentence
    assert version_folder(registry, 1).is_dir()


def test_a_newer_state_is_neither_continued_nor_replaced(site: Site) -> None:
    registry, state = site.registry, state_folder(site.registry, "old", 4)
    make_newer(state, StateManifest)
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    spec = TrainRequest(dataset=(site.text,), resume=1, overrides={"max_steps": "6"})
    with pytest.raises(NewerFormat, match="written by a newer gptloop"):
        site.train(spec.resolve(registry))
    with pytest.raises(NewerFormat, match="written by a newer gptloop"):
        registry.write_state(registry.take_over("old"), 4, lambda _: None)
    assert {path.name: path.read_bytes() for path in state.iterdir()} == before
