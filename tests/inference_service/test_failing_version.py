"""A version that passes the examination and fails its streams later."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from inference_service.client import AdminClient, InferenceClient
from shared.errors import GptloopError
from shared.gpt.weights import load_arrays, save_arrays
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.fakes import publish_tiny_version
from tests.inference_service.process import Server
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

BAD_BYTE = "Z"


def poison_a_token(directory: Path) -> None:
    """Makes all that is computed from one token infinite; the held-out windows do not contain it."""
    assert ord(BAD_BYTE) not in np.load(directory / "evaluation.npy")
    path = directory / "model.safetensors"
    arrays = load_arrays(path)
    embedding = arrays["token_embedding.weight"]
    rows = mx.arange(embedding.shape[0])[:, None]
    arrays["token_embedding.weight"] = mx.where(rows == ord(BAD_BYTE), 3e38, embedding)
    save_arrays(arrays, path)


def test_a_failing_version_is_rolled_back_and_the_server_stays_healthy(tmp_path: Path) -> None:
    server = Server(tmp_path / "var")
    try:
        publish_tiny_version(server.registry, 2.0)
        wait_until(server.serves)
        with InferenceClient(server.address, retries=0) as client, AdminClient(server.address) as admin:
            publish_tiny_version(server.registry, 1.0, change=poison_a_token)
            wait_until(lambda: client.model().version == 2)
            whole = client.complete("Once", seed=1, max_tokens=40, ignore_eos=True, logit_bias={ord(BAD_BYTE): -100})
            assert whole.version == 2
            for _ in range(3):
                with pytest.raises(GptloopError, match="computes no finite numbers"):
                    client.complete(BAD_BYTE)
            wait_until(lambda: client.model().version == 1)
            assert client.complete(BAD_BYTE, max_tokens=5).version == 1
            refused = admin.versions().versions[1]
        page = server.metrics()
        log = "".join(server.lines)
    finally:
        assert server.end() == 0, server.lines
    assert refused.state == pb.VERSION_STATE_REFUSED
    assert refused.reason.startswith("failing: 3 failures within 60 s")
    assert page["gptloop_inference_refused_versions_total", "failing"] == 1
    # Once, at the start.
    assert log.count("health is ") == 1 and "health is SERVING" in log
