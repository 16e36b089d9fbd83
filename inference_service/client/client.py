"""The clients of the inference service, one for threads and one for asyncio."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
import grpc.aio

from inference_service.client.attempts import Attempts
from inference_service.client.completion import Completion, complete
from inference_service.client.stream import AsyncStream, Stream
from shared.errors import FailedPrecondition, InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.client_channel import NO_PROXY, Connection, sendable

DEFAULT_RETRIES = 2

_OPTIONS = (
    # By default, a channel waits up to two minutes before it tries to reconnect.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_SAMPLING = frozenset(pb.Sampling.DESCRIPTOR.fields_by_name)

_T = TypeVar("_T")


class Parameters(TypedDict, total=False):
    """The parameters of a generation. None means the server's default.

    `timeout_s` limits the whole call. All others are fields of the messages `GenerateRequest`, `ModelSelector` and
    `Sampling`, which document them. `stop` may be a single text.
    """

    version: int | None
    label: str | None
    seed: int | None
    n: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None
    logprobs: int | None
    timeout_s: float | None


class InferenceClient(Connection):
    """A client of the server at `host:port`. Several threads may share it.

    A call that finds no server, or a full one, is retried up to `retries` times before its deadline, unless a part of
    the answer has arrived (see `Attempts`). Every method raises the error that the server raised, `Unavailable` if no
    server answers, and `DeadlineExceeded` if the call takes longer than `timeout_s`.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES) -> None:
        super().__init__(address, *_OPTIONS)
        self._retries = retries
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Stream:
        """Starts a generation from a text or from token ids; leaving the stream cancels it."""
        attempts = Attempts(self._address, self._retries, parameters.get("timeout_s"))
        return Stream(self._stub.Generate, _generate_request(prompt, parameters), attempts)

    def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids; returns when all samples have ended."""
        with self.generate(prompt, **parameters) as stream:
            return complete(list(stream))

    def tokenize(
        self, text: str, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """Returns the token ids of a text."""
        request = _tokenize_request(text, version, label)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(
        self,
        tokens: Sequence[int],
        version: int | None = None,
        label: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids."""
        request = _detokenize_request(tokens, version, label)
        return str(self._call(self._stub.Detokenize, request, timeout_s).text)

    def model(
        self, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """Describes a version, by default the serving one."""
        request = _model_request(version, label)
        response: pb.GetModelResponse = self._call(self._stub.GetModel, request, timeout_s)
        return response

    def _call(self, method: Callable[..., _T], request: object, timeout_s: float | None) -> _T:
        attempts = Attempts(self._address, self._retries, timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.remaining_s())
            except grpc.RpcError as failure:
                time.sleep(attempts.pause_s(failure))


class AsyncInferenceClient:
    """`InferenceClient` for asyncio, with the same methods. Create it on a running event loop.

    Its methods raise `FailedPrecondition` on any other event loop.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES) -> None:
        self._address = address
        self._retries = retries
        self._loop = asyncio.get_running_loop()
        self._channel = grpc.aio.insecure_channel(address, options=(NO_PROXY, *_OPTIONS))
        self._methods = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel and cancels every call on it."""
        await self._channel.close()

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> AsyncStream:
        """Starts a generation from a text or from token ids; leaving the stream cancels it."""
        attempts = Attempts(self._address, self._retries, parameters.get("timeout_s"))
        return AsyncStream(self._stub.Generate, _generate_request(prompt, parameters), attempts)

    async def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids; returns when all samples have ended."""
        async with self.generate(prompt, **parameters) as stream:
            return complete([event async for event in stream])

    async def tokenize(
        self, text: str, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """Returns the token ids of a text."""
        request = _tokenize_request(text, version, label)
        return list((await self._call(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
        self,
        tokens: Sequence[int],
        version: int | None = None,
        label: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """Returns the text of token ids."""
        request = _detokenize_request(tokens, version, label)
        return str((await self._call(self._stub.Detokenize, request, timeout_s)).text)

    async def model(
        self, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """Describes a version, by default the serving one."""
        request = _model_request(version, label)
        response: pb.GetModelResponse = await self._call(self._stub.GetModel, request, timeout_s)
        return response

    @property
    def _stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        if asyncio.get_running_loop() is not self._loop:
            raise FailedPrecondition("This client belongs to another event loop; create one client for each loop.")
        return self._methods

    async def _call(self, method: Callable[..., Awaitable[_T]], request: object, timeout_s: float | None) -> _T:
        attempts = Attempts(self._address, self._retries, timeout_s)
        while True:
            try:
                return await method(request, timeout=attempts.remaining_s())
            except grpc.RpcError as failure:
                await asyncio.sleep(attempts.pause_s(failure))


def _generate_request(prompt: str | Sequence[int], parameters: Parameters) -> pb.GenerateRequest:
    given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
    given.pop("timeout_s", None)
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    with sendable():
        model = _selector(given.pop("version", None), given.pop("label", None))
        sampling = pb.Sampling(**{name: given.pop(name) for name in _SAMPLING if name in given})
        if isinstance(prompt, str):
            return pb.GenerateRequest(prompt=prompt, model=model, sampling=sampling, **given)
        return pb.GenerateRequest(prompt_tokens=pb.TokenIds(ids=prompt), model=model, sampling=sampling, **given)


def _tokenize_request(text: str, version: int | None, label: str | None) -> pb.TokenizeRequest:
    with sendable():
        return pb.TokenizeRequest(text=text, model=_selector(version, label))


def _detokenize_request(tokens: Sequence[int], version: int | None, label: str | None) -> pb.DetokenizeRequest:
    with sendable():
        return pb.DetokenizeRequest(token_ids=tokens, model=_selector(version, label))


def _model_request(version: int | None, label: str | None) -> pb.GetModelRequest:
    with sendable():
        return pb.GetModelRequest(model=_selector(version, label))


def _selector(version: int | None, label: str | None) -> pb.ModelSelector | None:
    if version is not None and label is not None:
        raise InvalidArgument(f"version {version} and label {label!r} exclude each other; give only one.")
    if version is None and label is None:
        return None
    return pb.ModelSelector(version=version) if label is None else pb.ModelSelector(label=label)
