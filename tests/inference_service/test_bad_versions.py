"""Versions that must not serve, published while a server has streams all the time."""

import threading
from pathlib import Path

import pytest

from inference_service.client import AdminClient
from shared.errors import FailedPrecondition
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server, text_of
from tests.inference_service.spoiling import (
    BAD_SEED,
    GOOD_SEED,
    cut_off,
    flip_a_bit,
    huge_weights,
    lose_a_file,
    other_shape,
    spoil_weights,
)
from tests.inference_service.world import drop
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

STREAMS = 6
# Changes before the commit of a version, and after it.
SPOILED = {"not_finite": [spoil_weights, huge_weights], "unfit": [other_shape]}
CHANGED, INCOMPLETE = [flip_a_bit], [cut_off, lose_a_file]


def test_bad_versions_never_serve_and_the_old_one_never_stops(tmp_path: Path) -> None:
    server = Server(tmp_path / "var", GPTLOOP_INFERENCE_GATE_MARGIN="0.05")
    texts: list[str] = []
    versions: set[int] = set()
    failures: list[Exception] = []
    done = threading.Event()

    def stream() -> None:
        with server.client() as client:
            while not done.is_set():
                try:
                    events = list(client.generate("Once", seed=3, max_tokens=90, ignore_eos=True))
                except Exception as error:
                    failures.append(error)
                    return
                assert isinstance(events[0], pb.Started)
                versions.add(events[0].model_version)
                texts.append(text_of(iter(events)))

    readers = [threading.Thread(target=stream) for _ in range(STREAMS)]
    try:
        publish_tiny_version(server.registry, 2.0, seed=GOOD_SEED)
        wait_until(server.serves)
        for reader in readers:
            reader.start()
        for changes in SPOILED.values():
            for change in changes:
                publish_tiny_version(server.registry, 0.5, seed=GOOD_SEED, change=change)
        publish_tiny_version(server.registry, 0.4, seed=GOOD_SEED, better_by=0.1)
        publish_tiny_version(server.registry, 0.3, seed=BAD_SEED)
        for change in CHANGED + INCOMPLETE:
            drop(server.registry, change)
        with AdminClient(server.address) as admin:
            wait_until(lambda: sum(one.state == pb.VERSION_STATE_REFUSED for one in admin.versions().versions) == 6)
            listing = admin.versions().versions
        reasons = [one.reason.partition(":")[0] for one in listing]
        waits = [f"Version {number} waits for its files" for number in (8, 9)]
        assert reasons == ["", "not_finite", "not_finite", "unfit", "loss_mismatch", "worse", "corrupt", *waits]
        with server.client() as client:
            for number in range(2, 8):
                with pytest.raises(FailedPrecondition, match=f"Version {number} cannot serve: "):
                    list(client.generate("x", version=number))
        so_far = len(texts)
        wait_until(lambda: len(texts) > so_far + STREAMS)
    finally:
        done.set()
        for reader in readers:
            reader.join()
        page = server.metrics()
        assert server.end() == 0, server.lines
    assert failures == []
    assert versions == {1} and len(set(texts)) == 1
    name = "gptloop_inference_refused_versions_total"
    refused = {key[1]: value for key, value in page.items() if key[0] == name and value}
    assert refused == {"not_finite": 2, "unfit": 1, "loss_mismatch": 1, "worse": 1, "corrupt": 1}
    assert page["gptloop_inference_swaps_total",] == 0
    assert "Traceback" not in "".join(server.lines)
