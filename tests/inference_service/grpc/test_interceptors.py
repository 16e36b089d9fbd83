"""The bearer token of operators: which calls need it, and what a call without it gets."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from inference_service.client import AdminClient, Credentials, InferenceClient
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import ROOT
from tests.waiting import HANG_S


def test_every_admin_call_needs_the_token(operated: Operated) -> None:
    serving = operated.publish_serving()
    with grpc.insecure_channel(operated.server.address) as channel:
        stub: Any = inference_pb2_grpc.ModelAdminServiceStub(channel)
        for metadata, found in (
            ((), "no bearer token"),
            ((("token", TOKEN),), "no bearer token"),
            ((("authorization", ""),), "no bearer token"),
            ((("authorization", "Bearer close sesame"),), "the wrong bearer token"),
            ((("authorization", f"Bearer {TOKEN}!"),), "the wrong bearer token"),
            ((("authorization", f"Bearer {TOKEN[:-1]}"),), "the wrong bearer token"),
            ((("authorization", f"Basic {TOKEN}"),), "the wrong bearer token"),
            ((("authorization", TOKEN),), "the wrong bearer token"),
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
                assert f"has {found}: set GPTLOOP_ADMIN_TOKEN" in str(ended.value.details())
    assert (operated.state(serving), operated.admin.versions().policy) == ("SERVING", "best")


def test_an_unknown_method_is_unimplemented_even_without_the_token(operated: Operated) -> None:
    with grpc.insecure_channel(operated.server.address) as channel:
        call: Any = channel.unary_unary("/inference.v1.ModelAdminService/Anything")
        with pytest.raises(grpc.RpcError) as failed:
            call(b"")
    assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    # Clients cannot add series to the metrics.
    assert not any("Anything" in labels for labels in operated.server.metrics())


def test_the_error_of_a_missing_or_wrong_token_says_what_to_do(operated: Operated) -> None:
    for wrong, found in (("", "no bearer token"), ("close sesame", "the wrong bearer token")):
        with (
            AdminClient(operated.server.address, Credentials(token=wrong)) as admin,
            pytest.raises(errors.Unauthenticated) as ended,
        ):
            admin.versions()
        assert str(ended.value) == (
            f"This call has {found}: set GPTLOOP_ADMIN_TOKEN to the server's value, or send the metadata "
            '"authorization: Bearer <token>".'
        )


def test_generating_and_health_need_no_token(operated: Operated) -> None:
    serving = operated.publish_serving()
    assert operated.server.serves()
    assert operated.server.health("inference.v1.ModelAdminService") == health_pb2.HealthCheckResponse.SERVING
    with InferenceClient(operated.server.address) as client:
        assert client.model().version == serving
        assert client.tokenize("a") == [97]
        assert client.complete("x", max_tokens=1).version == serving


@pytest.mark.parametrize("token", ["open\nsesame", "öffne dich"])
def test_the_server_does_not_start_with_a_token_that_metadata_cannot_carry(tmp_path: Path, token: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "inference_service", "serve"],
        cwd=ROOT,
        env={**os.environ, "GPTLOOP_VAR": str(tmp_path / "var"), "GPTLOOP_ADMIN_TOKEN": token},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert (done.returncode, done.stdout) == (2, "")
    sentence = "contains a character that metadata cannot carry; use printable ASCII on one line."
    assert done.stderr == f"error: GPTLOOP_ADMIN_TOKEN {sentence}\n"
