"""A small, deterministic share of `tests.soak.fuzz`, with the same inputs each time."""

import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2
from tests.fuzzers import calls, files, secured
from tests.fuzzers.area import Area
from tests.fuzzers.registry import KINDS, choose, files_of, kind_of, registry_of
from tests.mutations import odd_message
from tests.registries import root_of


@pytest.mark.parametrize(
    ("try_one", "inputs"),
    [(files.try_registry, 90), (files.try_version, 80), (files.try_tokens, 300), (files.try_ledger, 300)],
)
@pytest.mark.slow
def test_changed_files_end_nothing_by_a_mistake(
    try_one: Callable[[random.Random, Area, Path], None],
    inputs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPTLOOP_VAR", str(tmp_path))
    registry_of(tmp_path)
    area, rng = Area("files"), random.Random(0)
    for _ in range(inputs):
        try_one(rng, area, tmp_path)
    assert (area.inputs, area.findings) == (inputs, {})


def test_each_kind_of_file_is_in_the_registry_and_chosen(tmp_path: Path) -> None:
    root, rng = root_of(registry_of(tmp_path)), random.Random(0)
    assert {kind_of(path, root) for path in files_of(root)} == set(KINDS)
    assert {choose(rng, root)[0] for _ in range(200)} == set(KINDS)


@pytest.mark.slow
def test_a_server_with_tls_survives_odd_connections_and_files(tmp_path: Path) -> None:
    target, area, rng = secured.SecuredTarget(tmp_path), Area("TLS"), random.Random(0)
    kept: list[socket.socket] = []
    try:
        for _ in range(20):
            secured.try_handshake(rng, area, target, kept)
            secured.try_pem(rng, area, target)
            secured.try_live_tokens(rng, area, target)
        secured.read_log(area, target)
    finally:
        for each in kept:
            each.close()
        assert target.server.end() == 0
    assert (area.inputs, area.findings) == (60, {})


@pytest.mark.parametrize("module", [inference_pb2, training_pb2])
def test_odd_messages_fill_the_fields_of_each_request(module: object) -> None:
    rng = random.Random(0)
    for _, kind in calls.methods(module):
        names = {field.name for _ in range(200) for field, _ in odd_message(rng, kind).ListFields()}
        assert names == set(kind.DESCRIPTOR.fields_by_name)
