"""The format of weights that a server on a CPU is told to use."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from shared.decoding.weight_format import WeightFormat
from shared.gpt.operations import on_cpu
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.fakes import publish_tiny_version
from tests.inference_service.process import ROOT, SERVE, Server
from tests.waiting import HANG_S, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not on_cpu(), reason="The format is chosen on a CPU.")]


@pytest.mark.parametrize("weights", WeightFormat)
def test_the_format_that_was_chosen_serves_and_is_named(tmp_path: Path, weights: WeightFormat) -> None:
    server = Server(tmp_path / "var", GPTLOOP_INFERENCE_WEIGHTS=weights)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        with server.client() as client:
            started, *_ = client.generate("Once", max_tokens=3)
        assert isinstance(started, pb.Started) and started.weight_format == weights
        answer = httpx.post(
            f"{server.page_url}v1/completions", json={"model": "1", "prompt": "Once", "max_tokens": 3}, timeout=HANG_S
        )
        assert answer.json()["weight_format"] == weights
        (labels,) = [labels for name, *labels in server.metrics() if name == "gptloop_inference_model_info"]
        assert labels[-1] == weights
        wait_until(lambda: bool(server.registry.decisions.findings()))
        assert [each.device for each in server.registry.decisions.findings()[1]] == [f"cpu_{weights}"]
    finally:
        server.end()


def test_a_format_that_does_not_exist_is_named(tmp_path: Path) -> None:
    environment = {"GPTLOOP_VAR": str(tmp_path), "GPTLOOP_INFERENCE_WEIGHTS": "int4"}
    ended = subprocess.run(
        [sys.executable, *SERVE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert ended.returncode == 2
    assert "GPTLOOP_INFERENCE_WEIGHTS is 'int4', but must be fp32, bf16 or int8." in ended.stderr
    assert "Traceback" not in ended.stderr
