"""The clients of the inference service, one for threads and one for asyncio."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Self, TypedDict, TypeVar, Unpack

import grpc

from inference_service.client.attempts import Attempts
from inference_service.client.completion import Completion, complete
from inference_service.client.stream import AsyncStream, Stream
from shared.errors import FailedPrecondition, InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.access.credentials import PLAIN, Credentials
from shared.service.client_channel import Connection, open_aio_channel, sendable

DEFAULT_RETRIES = 2

_OPTIONS = (
    # By default, a channel waits up to two minutes before it tries to reconnect. `attempts.py` waits longer than this,
    # so a call is not failed by the last of several servers while another has just come back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
)

_SAMPLING = frozenset(pb.Sampling.DESCRIPTOR.fields_by_name)

# Takes from an answer what a call returns.
_Read = Callable[[Any], object]

_Stream = TypeVar("_Stream")
_Ids = TypeVar("_Ids")
_Text = TypeVar("_Text")
_Model = TypeVar("_Model")


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
    prompt_logprobs: int | None
    timeout_s: float | None


class _Calls(ABC, Generic[_Stream, _Ids, _Text, _Model]):
    """The calls of both clients, which differ only in how they wait, and so in the types of what they return."""

    _address: str
    _metadata: tuple[tuple[str, str], ...]
    _retries: int
    _stub: inference_pb2_grpc.InferenceServiceStub

    def generate(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> _Stream:
        """Starts a generation from a text or from token ids; leaving the stream cancels it."""
        attempts = Attempts(self._address, self._retries, parameters.get("timeout_s"))
        return self._open(_generate_request(prompt, parameters), attempts)

    def tokenize(
        self, text: str, version: int | None = None, label: str | None = None, timeout_s: float | None = None
    ) -> _Ids:
        """Returns the token ids of a text."""
        with sendable():
            request = pb.TokenizeRequest(text=text, model=_selector(version, label))
        token_ids: _Ids = self._call(self._stub.Tokenize, request, timeout_s, lambda answer: list(answer.token_ids))
        return token_ids

    def detokenize(
        self,
        tokens: Sequence[int],
        version: int | None = None,
        label: str | None = None,
        timeout_s: float | None = None,
    ) -> _Text:
        """Returns the text of token ids."""
        with sendable():
            request = pb.DetokenizeRequest(token_ids=tokens, model=_selector(version, label))
        text: _Text = self._call(self._stub.Detokenize, request, timeout_s, lambda answer: answer.text)
        return text

    def model(self, version: int | None = None, label: str | None = None, timeout_s: float | None = None) -> _Model:
        """Describes a version, by default the serving one."""
        with sendable():
            request = pb.GetModelRequest(model=_selector(version, label))
        model: _Model = self._call(self._stub.GetModel, request, timeout_s, lambda answer: answer)
        return model

    @abstractmethod
    def _open(self, request: pb.GenerateRequest, attempts: Attempts) -> _Stream:
        """Starts a stream."""

    @abstractmethod
    def _call(self, method: Callable[..., Any], request: object, timeout_s: float | None, read: _Read) -> Any:
        """Calls a method, retries as `Attempts` decides, and returns what `read` makes of the answer."""


class InferenceClient(Connection, _Calls[Stream, list[int], str, pb.GetModelResponse]):
    """A client of the server at `host:port`, or of several servers (see `read_target`). Several threads may share it.

    A call that finds no server, a full one or one that stops is retried up to `retries` times before its deadline,
    unless a part of the answer has arrived (see `Attempts`). Every method raises the error that the server raised,
    `Unavailable` if no server answers, and `DeadlineExceeded` if the call takes longer than `timeout_s`.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES, credentials: Credentials = PLAIN) -> None:
        super().__init__(address, credentials, *_OPTIONS)
        self._retries = retries
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids; returns when all samples have ended."""
        with self.generate(prompt, **parameters) as stream:
            return complete(list(stream))

    def _open(self, request: pb.GenerateRequest, attempts: Attempts) -> Stream:
        return Stream(partial(self._stub.Generate, metadata=self._metadata), request, attempts)

    def _call(self, method: Callable[..., Any], request: object, timeout_s: float | None, read: _Read) -> Any:
        attempts = Attempts(self._address, self._retries, timeout_s)
        while True:
            try:
                return read(method(request, timeout=attempts.remaining_s(), metadata=self._metadata))
            except grpc.RpcError as failure:
                time.sleep(attempts.pause_s(failure))


class AsyncInferenceClient(
    _Calls[
        AsyncStream, Coroutine[Any, Any, list[int]], Coroutine[Any, Any, str], Coroutine[Any, Any, pb.GetModelResponse]
    ]
):
    """`InferenceClient` for asyncio, with the same methods. Create it on a running event loop.

    Its methods raise `FailedPrecondition` on any other event loop.
    """

    def __init__(self, address: str, retries: int = DEFAULT_RETRIES, credentials: Credentials = PLAIN) -> None:
        self._address = address
        self._metadata = credentials.to_metadata()
        self._retries = retries
        self._loop = asyncio.get_running_loop()
        self._channel = open_aio_channel(address, credentials, _OPTIONS)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel and cancels every call on it."""
        await self._channel.close()

    async def complete(self, prompt: str | Sequence[int], **parameters: Unpack[Parameters]) -> Completion:
        """Generates from a text or from token ids; returns when all samples have ended."""
        async with self.generate(prompt, **parameters) as stream:
            return complete([event async for event in stream])

    def _open(self, request: pb.GenerateRequest, attempts: Attempts) -> AsyncStream:
        self._check_loop()
        return AsyncStream(partial(self._stub.Generate, metadata=self._metadata), request, attempts)

    async def _call(
        self, method: Callable[..., Any], request: object, timeout_s: float | None, read: Callable[[Any], object]
    ) -> Any:
        self._check_loop()
        attempts = Attempts(self._address, self._retries, timeout_s)
        while True:
            try:
                return read(await method(request, timeout=attempts.remaining_s(), metadata=self._metadata))
            except grpc.RpcError as failure:
                await asyncio.sleep(attempts.pause_s(failure))

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise FailedPrecondition("This client belongs to another event loop; create one client for each loop.")


def _generate_request(prompt: str | Sequence[int], parameters: Parameters) -> pb.GenerateRequest:
    given: dict[str, Any] = {name: value for name, value in parameters.items() if value is not None}
    given.pop("timeout_s", None)
    if isinstance(stop := given.get("stop"), str):
        given["stop"] = [stop]
    with sendable():
        model = _selector(given.pop("version", None), given.pop("label", None))
        sampling = pb.Sampling(**{name: given.pop(name) for name in _SAMPLING if name in given})
        text, tokens = (prompt, None) if isinstance(prompt, str) else (None, pb.TokenIds(ids=prompt))
        return pb.GenerateRequest(prompt=text, prompt_tokens=tokens, model=model, sampling=sampling, **given)


def _selector(version: int | None, label: str | None) -> pb.ModelSelector | None:
    if version is not None and label is not None:
        raise InvalidArgument(f"version {version} and label {label!r} exclude each other; give only one.")
    if version is None and label is None:
        return None
    return pb.ModelSelector(version=version, label=label)
