"""A small, deterministic share of `tests.soak.fuzz`: what needs no running server, with the same inputs each time."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.pb.inference.v1 import inference_pb2
from shared.pb.training.v1 import training_pb2
from tests.fuzzers import calls, files
from tests.fuzzers.area import Area
from tests.mutations import odd_message


@pytest.mark.parametrize(
    ("try_one", "inputs"),
    [(files.try_commands, 60), (files.try_version, 80), (files.try_tokens, 300), (files.try_ledger, 300)],
)
@pytest.mark.slow
def test_changed_files_end_nothing_by_a_mistake(
    try_one: Callable[[random.Random, Area, Path], None],
    inputs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GPTLOOP_VAR", str(tmp_path))
    files.registry_of(tmp_path)
    area, rng = Area("files"), random.Random(0)
    for _ in range(inputs):
        try_one(rng, area, tmp_path)
    assert (area.inputs, area.findings) == (inputs, {})


@pytest.mark.parametrize("module", [inference_pb2, training_pb2])
def test_odd_messages_fill_the_fields_of_each_request(module: object) -> None:
    rng = random.Random(0)
    for _, kind in calls.methods(module):
        names = {field.name for _ in range(200) for field, _ in odd_message(rng, kind).ListFields()}
        assert names == set(kind.DESCRIPTOR.fields_by_name)
