"""The clients of the inference service, one for threads and one for asyncio."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
import grpc.aio

from inference_service.client.attempts import Attempts
from inference_service.client.channel import NO_PROXY, sendable
from inference_service.client.completion import Completion, complete
from inference_service.client.stream import AsyncStream, Stream
from shared.errors import FailedPrecondition, InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc

DEFAULT_RETRIES = 2

_OPTIONS = (
    NO_PROXY,
    # Without these a channel waits up to two minutes before it looks for a server again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_SAMPLING = frozenset(pb.Sampling.DESCRIPTOR.fields_by_name)

_T = TypeVar("_T")


class Parameters(TypedDict, total=False):
    """What a generation can be asked for; None is as absent, and the server's default holds.

    All but `timeout_s`, the time in seconds that the whole call may take, are fields of the messages `GenerateRequest`,
    `ModelSelector` and `Sampling`, which say what they mean. `stop` may be a single text.
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


class InferenceClient:
    """One connection to a server, `host:port`. It is made with the first call, and calls may run on several threads.

    A call that finds no server, or one that has no place for it now, is made up to `retries` times again, while nothing
    of its answer was received and its time is not up: see `Attempts`. Every method raises the error that the server
    raised, `Unavailable` where there is no server, and `DeadlineExceeded` where the call took longer than `timeout_s`.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES) -> None:
        self._address = address
        self._retries = retries
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and every call on it."""
        self._channel.close()

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Stream:
        """Begins a generation from a text or from token ids; leaving the stream cancels it."""
        attempts = Attempts(self._address, self._retries, parameters.get("timeout_s"))
        return Stream(self._stub.Generate, _generate_request(prompt, parameters), attempts)

    def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids, and waits for the whole."""
        with self.generate(prompt, **parameters) as stream:
            return complete(list(stream))

    def tokenize(
        self, text: str, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """The tokens of a text."""
        request = _tokenize_request(text, version, label)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(
        self,
        tokens: Sequence[int],
        version: int | None = None,
        label: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """The text of tokens."""
        request = _detokenize_request(tokens, version, label)
        return str(self._call(self._stub.Detokenize, request, timeout_s).text)

    def model(
        self, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """What a version is, the serving one without a choice."""
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
    """`InferenceClient` for asyncio: the same methods. It is made on a running event loop and belongs to it.

    Its methods raise `FailedPrecondition` on any other loop.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES) -> None:
        self._address = address
        self._retries = retries
        self._loop = asyncio.get_running_loop()
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._methods = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and every call on it."""
        await self._channel.close()

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> AsyncStream:
        """Begins a generation from a text or from token ids; leaving the stream cancels it."""
        attempts = Attempts(self._address, self._retries, parameters.get("timeout_s"))
        return AsyncStream(self._stub.Generate, _generate_request(prompt, parameters), attempts)

    async def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids, and waits for the whole."""
        async with self.generate(prompt, **parameters) as stream:
            return complete([event async for event in stream])

    async def tokenize(
        self, text: str, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> list[int]:
        """The tokens of a text."""
        request = _tokenize_request(text, version, label)
        return list((await self._call(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
        self,
        tokens: Sequence[int],
        version: int | None = None,
        label: str | None = None,
        timeout_s: float | None = None,
    ) -> str:
        """The text of tokens."""
        request = _detokenize_request(tokens, version, label)
        return str((await self._call(self._stub.Detokenize, request, timeout_s)).text)

    async def model(
        self, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> pb.GetModelResponse:
        """What a version is, the serving one without a choice."""
        request = _model_request(version, label)
        response: pb.GetModelResponse = await self._call(self._stub.GetModel, request, timeout_s)
        return response

    @property
    def _stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        if asyncio.get_running_loop() is not self._loop:
            raise FailedPrecondition("This client belongs to another event loop: make one for each loop.")
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
        raise InvalidArgument(f"Both version {version} and label {label!r} are given, but only one of them can choose.")
    if version is None and label is None:
        return None
    return pb.ModelSelector(version=version) if label is None else pb.ModelSelector(label=label)
