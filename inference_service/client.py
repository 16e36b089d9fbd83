"""A synchronous client of the inference service."""

from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc

from shared.errors import InvalidArgument
from shared.grpc_status import error_of
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc

Event = pb.Started | pb.Delta | pb.Finished

_T = TypeVar("_T")


class Parameters(TypedDict, total=False):
    """What a generation can be asked for, as the messages `GenerateRequest` and `Sampling` say; None is as absent."""

    version: int | None
    label: str | None
    seed: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    ignore_eos: bool | None
    logprobs: int | None


class InferenceClient:
    """One connection to a server, `host:port`. It is made with the first call, and calls may run on several threads.

    Every method raises the error that the server raised, and `Unavailable` where there is no server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        # A proxy for the web has no way to a server on this machine.
        self._channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Generator[Event, None, None]:
        """Streams one generation from a text or from token ids; leaving the loop cancels it."""
        call = self._stub.Generate(_request(prompt, parameters))
        try:
            for response in call:
                yield getattr(response, response.WhichOneof("event"))
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
        finally:
            call.cancel()

    def tokenize(self, text: str, version: int | None = None, label: str | None = None) -> list[int]:
        """The tokens of a text."""
        request = pb.TokenizeRequest(text=text, model=_selector(version, label))
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def model(self, version: int | None = None, label: str | None = None) -> pb.GetModelResponse:
        """What a version is, the serving one without a choice."""
        response: pb.GetModelResponse = self._call(
            self._stub.GetModel, pb.GetModelRequest(model=_selector(version, label))
        )
        return response

    def _call(self, method: Callable[[object], _T], request: object) -> _T:
        try:
            return method(request)
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None


def _request(prompt: str | Sequence[int], parameters: Parameters) -> pb.GenerateRequest:
    """The message; raises `InvalidArgument` on a value that no field of it can hold."""
    given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
    selector = _selector(given.pop("version", None), given.pop("label", None))
    sampling = {name: given.pop(name) for name in pb.Sampling.DESCRIPTOR.fields_by_name if name in given}
    text: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_tokens": pb.TokenIds(ids=prompt)}
    try:
        return pb.GenerateRequest(**text, model=selector, sampling=pb.Sampling(**sampling), **given)
    except ValueError as error:
        raise InvalidArgument(f"A parameter cannot be sent: {error}.") from None


def _selector(version: int | None, label: str | None) -> pb.ModelSelector | None:
    if version is not None and label is not None:
        raise InvalidArgument(f"Both version {version} and label {label!r} are given, but only one of them can choose.")
    if version is None and label is None:
        return None
    return pb.ModelSelector(version=version) if label is None else pb.ModelSelector(label=label)
