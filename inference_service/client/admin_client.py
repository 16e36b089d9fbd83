"""The Python client of operators: lists the versions and chooses the one that serves."""

from collections.abc import Callable
from typing import Any

import grpc

from inference_service.client.attempts import START
from shared.errors import DeadlineExceeded
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.client_channel import Connection, sendable
from shared.service.grpc_status import error_of

_CALL_S = 30.0
# A version may wait for memory before it is read and examined.
_LOAD_S = 600.0


class AdminClient(Connection):
    """A client of the `ModelAdminService` at `host:port`.

    Every method raises the error that the server raised, `Unavailable` if no server answers, `DeadlineExceeded` if the
    call takes longer than `timeout_s`, and `InvalidArgument` if a value cannot be sent. No call is retried, because a
    second rollback would reject a second version.
    """

    def __init__(self, address: str, credentials: Credentials = PLAIN, timeout_s: float = _CALL_S) -> None:
        super().__init__(address, credentials)
        self._timeout_s = timeout_s
        self._stub: Any = inference_pb2_grpc.ModelAdminServiceStub(self._channel)

    def versions(self) -> pb.ListVersionsResponse:
        """Returns every version and the policy."""
        answer: pb.ListVersionsResponse = self._call(self._stub.ListVersions, pb.ListVersionsRequest)
        return answer

    def load(self, version: int, timeout_s: float = _LOAD_S) -> pb.VersionStatus:
        """Loads a version into memory; returns when it is there."""
        return self._status(self._stub.LoadVersion, pb.LoadVersionRequest, version, timeout_s)

    def unload(self, version: int) -> pb.VersionStatus:
        """Unloads a version once its last stream has ended; returns at once."""
        return self._status(self._stub.UnloadVersion, pb.UnloadVersionRequest, version)

    def promote(self, version: int) -> pb.VersionStatus:
        """Makes a version the stable one."""
        return self._status(self._stub.PromoteVersion, pb.PromoteVersionRequest, version)

    def set_policy(self, label: str) -> pb.VersionStatus | None:
        """Serves the version that a label names from now on; returns the version that serves now, if any."""
        answer = self._call(self._stub.SetPolicy, pb.SetPolicyRequest, label=label)
        return answer.serving if answer.HasField("serving") else None

    def roll_back(self, version: int | None = None) -> pb.VersionStatus:
        """Rejects the serving version and serves another one, which it returns."""
        return self._status(self._stub.RollBack, pb.RollBackRequest, version, _LOAD_S)

    def _status(
        self, method: Callable[..., Any], message: type[Any], version: int | None, timeout_s: float | None = None
    ) -> pb.VersionStatus:
        status: pb.VersionStatus = self._call(method, message, timeout_s, version=version).version
        return status

    def _call(
        self, method: Callable[..., Any], message: type[Any], timeout_s: float | None = None, **fields: int | str | None
    ) -> Any:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        with sendable():
            request = message(**fields)
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as failure:
            error = error_of(failure, self._address, START)
            if isinstance(error, DeadlineExceeded):
                error = DeadlineExceeded(f"The server at {self._address} did not answer within {timeout_s:g} s.")
            raise error from None
