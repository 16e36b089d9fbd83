"""What operators call, from Python: which version serves, and which one should."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from inference_service.client.channel import NO_PROXY, START_ADVICE, sendable
from inference_service.settings import check_credential
from shared.errors import DeadlineExceeded
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.grpc_status import error_of

_CALL_S = 30.0
# A version may have to wait for room, be read and be examined.
_LOAD_S = 600.0


class AdminClient:
    """A server's `ModelAdminService`, at an address like `host:port`; `credential` is the one that it asks for, if any.

    Every method raises the errors of `shared.errors` that the server raised, `Unavailable` where there is none,
    `DeadlineExceeded` where it takes longer than `timeout_s`, and `InvalidArgument` on what cannot be sent. None is
    called again by itself, as a second rollback would take a second version away.
    """

    def __init__(self, address: str, credential: str = "", timeout_s: float = _CALL_S) -> None:
        check_credential("The credential", credential)
        self._address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {credential}"),) if credential else ()
        self._channel = grpc.insecure_channel(address, options=(NO_PROXY,))
        self._stub: Any = inference_pb2_grpc.ModelAdminServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()

    def versions(self) -> pb.ListVersionsResponse:
        """Every version, and the label whose version serves."""
        answer: pb.ListVersionsResponse = self._call(self._stub.ListVersions, pb.ListVersionsRequest)
        return answer

    def load(self, version: int, timeout_s: float = _LOAD_S) -> pb.VersionStatus:
        """Brings a version into memory; returns when it is there."""
        return self._status(self._stub.LoadVersion, pb.LoadVersionRequest, version, timeout_s)

    def unload(self, version: int) -> pb.VersionStatus:
        """Lets a loaded version go once its last stream has ended."""
        return self._status(self._stub.UnloadVersion, pb.UnloadVersionRequest, version)

    def promote(self, version: int) -> pb.VersionStatus:
        """Makes a version the stable one."""
        return self._status(self._stub.PromoteVersion, pb.PromoteVersionRequest, version)

    def set_policy(self, label: str) -> pb.VersionStatus | None:
        """Lets the version of a label serve from now on; the one that serves at this moment, if one does."""
        answer = self._call(self._stub.SetPolicy, pb.SetPolicyRequest, label=label)
        return answer.serving if answer.HasField("serving") else None

    def roll_back(self, version: int | None = None) -> pb.VersionStatus:
        """Takes the serving version away for good; the one that serves instead."""
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
            error = error_of(failure, self._address, START_ADVICE)
            if isinstance(error, DeadlineExceeded):
                error = DeadlineExceeded(f"The server at {self._address} did not answer within {timeout_s:g} s.")
            raise error from None
