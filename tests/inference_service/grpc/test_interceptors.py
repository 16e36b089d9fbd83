"""The credential of operators: who brings it, who need not, and what the others are told."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from inference_service.client.admin_client import AdminClient
from inference_service.client.client import InferenceClient
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import ROOT
from tests.waiting import HANG_S


def test_every_admin_call_needs_the_credential(operated: Operated) -> None:
    serving = operated.publish_serving()
    with grpc.insecure_channel(operated.server.address) as channel:
        stub: Any = inference_pb2_grpc.ModelAdminServiceStub(channel)
        for metadata, brought in (
            ((), "none"),
            ((("token", TOKEN),), "none"),
            ((("authorization", ""),), "none"),
            ((("authorization", "Bearer close sesame"),), "another one"),
            ((("authorization", f"Bearer {TOKEN}!"),), "another one"),
            ((("authorization", f"Bearer {TOKEN[:-1]}"),), "another one"),
            ((("authorization", f"Basic {TOKEN}"),), "another one"),
            ((("authorization", TOKEN),), "another one"),
        ):
            for method, request in (
                (stub.ListVersions, pb.ListVersionsRequest()),
                (stub.LoadVersion, pb.LoadVersionRequest(version=1)),
                (stub.UnloadVersion, pb.UnloadVersionRequest(version=1)),
                (stub.PromoteVersion, pb.PromoteVersionRequest(version=1)),
                (stub.SetPolicy, pb.SetPolicyRequest(label="pinned:1")),
                (stub.RollBack, pb.RollBackRequest()),
            ):
                with pytest.raises(grpc.RpcError) as ended:
                    method(request, timeout=HANG_S, metadata=metadata)
                assert ended.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert f"brings {brought}: set GPTLOOP_ADMIN_TOKEN" in str(ended.value.details())
    assert (operated.state(serving), operated.admin.versions().policy) == ("SERVING", "best")


def test_a_method_that_does_not_exist_is_unknown_to_everybody(operated: Operated) -> None:
    with grpc.insecure_channel(operated.server.address) as channel:
        call: Any = channel.unary_unary("/inference.v1.ModelAdminService/Anything")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
    # Names from outside make no series.
    assert not any("Anything" in labels for labels in operated.server.metrics())


def test_a_client_without_the_credential_is_told_what_to_do(operated: Operated) -> None:
    for wrong, brought in (("", "none"), ("close sesame", "another one")):
        with AdminClient(operated.server.address, wrong) as admin, pytest.raises(errors.Unauthenticated) as ended:
            admin.versions()
        assert str(ended.value) == (
            f"This call needs the credential of the server's operators, but brings {brought}: set GPTLOOP_ADMIN_TOKEN "
            'to the one that the server has, or send it as the metadata "authorization: Bearer <credential>".'
        )


def test_clients_that_generate_need_no_credential(operated: Operated) -> None:
    serving = operated.publish_serving()
    assert operated.server.serves()
    assert operated.server.health("inference.v1.ModelAdminService") == health_pb2.HealthCheckResponse.SERVING
    with InferenceClient(operated.server.address) as client:
        assert client.model().version == serving
        assert client.tokenize("a") == [97]
        assert client.complete("x", max_tokens=1).version == serving


@pytest.mark.parametrize("token", ["open\nsesame", "öffne dich"])
def test_a_server_does_not_start_with_a_credential_that_no_call_can_carry(tmp_path: Path, token: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inference_service", "serve"],
        cwd=ROOT,
        env={**os.environ, "GPTLOOP_VAR": str(tmp_path / "var"), "GPTLOOP_ADMIN_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "holds a character that no call can carry: it must be printable ASCII, on one line."
    assert done.stderr == f"error: GPTLOOP_ADMIN_TOKEN {sentence}\n"
