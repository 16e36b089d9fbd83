"""Trainer and servers on a registry in object storage, a real S3 server that is killed and comes back."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from inference_service.client import InferenceClient
from shared.errors import Unavailable
from shared.pb.training.v1 import training_pb2 as pb
from shared.service.settings import read_directories
from tests.end_to_end.conftest import System, is_progress, running
from tests.inference_service.process import Server
from tests.object_storage.server import MISSING, ObjectServer, is_installed
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not is_installed(), reason=MISSING)]


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    server = ObjectServer(tmp_path_factory.mktemp("objects"))
    yield server
    server.end()


@pytest.fixture
def system(
    store: ObjectServer, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[System]:
    # The library of the store reads the variables of this process.
    for name, value in store.place().settings.items():
        monkeypatch.setenv(name, value)
    var = str(tmp_path_factory.mktemp("system"))
    with running(read_directories(os.environ | {"GPTLOOP_VAR": var})) as everything:
        yield everything


def _text(client: InferenceClient, version: int) -> str:
    return "".join(client.generate("Once", seed=7, version=version, ignore_eos=True, max_tokens=50).text())


def _serving(client: InferenceClient) -> int:
    with suppress(Unavailable):
        return int(client.model().version)
    return 0


def _newest(system: System) -> int:
    return max((version.version for version in system.registry.versions()), default=0)


def test_a_killed_store_costs_checkpoints_only_and_another_server_serves_the_same(
    system: System, store: ObjectServer, tmp_path: Path
) -> None:
    job = system.enqueue(max_steps="100000", evaluation_interval="50")
    system.watch(job, is_progress(10))
    with system.client() as client:
        wait_until(lambda: _serving(client) > 0)
        serves = _serving(client)
        before = _text(client, serves)
        newest = _newest(system)

        store.kill()
        system.advance(job, 100)
        assert _text(client, serves) == before

        store.start()
        wait_until(lambda: _newest(system) > newest + 1)
        system.trainer.cancel(job)
        ended = system.end(job)
        assert (ended.state, ended.attempt) == (pb.JOB_STATE_CANCELLED, 1)
        best = system.registry.resolve("best").version
        wait_until(lambda: _serving(client) == best)
        other = Server(tmp_path / "other")
        try:
            with other.client() as second:
                wait_until(lambda: _serving(second) == best, lost=lambda: other.process.poll() is not None)
                assert _text(second, best) == _text(client, best)
        finally:
            other.end()
