"""A gRPC server that follows a script: a fake service on a real server."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import Message

from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.grpc_status import code_of, details_of
from tests.waiting import HANG_S, wait_until

STARTED = pb.Started(request_id="r1", model_version=7, seed=2**64 - 1, prompt_tokens=3)
STORY = (
    STARTED,
    pb.Delta(text="a ", token_ids=[1]),
    pb.Delta(token_ids=[2]),
    pb.Delta(text="fox", token_ids=[3]),
    pb.Finished(reason=pb.FINISH_REASON_LENGTH, prompt_tokens=3, generated_tokens=3),
)

# Yields the messages of one call: the events of Generate, or the only answer of another method.
Script = Callable[["ScriptedServer", Message, grpc.ServicerContext], Iterator[Message]]
Serve = Callable[..., "ScriptedServer"]


class ScriptedServer(inference_pb2_grpc.InferenceServiceServicer):
    """A server whose calls each follow the next script; all calls after the last script follow that one."""

    def __init__(self, *scripts: Script, port: int = 0) -> None:
        self._scripts = list(scripts)
        self._lock = threading.Lock()
        self.requests: list[Message] = []
        # When each call arrived, and how much time it had left.
        self.arrived_s: list[float] = []
        self.remaining_s: list[float] = []
        # Set once a client has left a call that does not end by itself.
        self.left = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(16))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(None).wait()

    def await_calls(self, number: int) -> None:
        wait_until(lambda: len(self.requests) >= number)

    def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateResponse]:
        for event in self._next(request, context):
            match event:
                case pb.Started():
                    yield pb.GenerateResponse(started=event)
                case pb.Delta():
                    yield pb.GenerateResponse(delta=event)
                case pb.Finished():
                    yield pb.GenerateResponse(finished=event)

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return [pb.TokenizeResponse(), *self._next(request, context)][-1]

    def Detokenize(self, request: pb.DetokenizeRequest, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return [pb.DetokenizeResponse(), *self._next(request, context)][-1]

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> Message:  # noqa: N802
        return [pb.GetModelResponse(), *self._next(request, context)][-1]

    def _next(self, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        with self._lock:
            self.arrived_s.append(time.monotonic())
            self.remaining_s.append(context.time_remaining())
            self.requests.append(request)
            script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        return script(self, request, context)


def send(*messages: Message) -> Script:
    """Sends messages and ends."""
    return lambda server, request, context: iter(messages)


def fail(error: errors.GptloopError, *messages: Message) -> Script:
    """Sends messages and ends with an error, as the services do."""

    def script(server: ScriptedServer, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        yield from messages
        context.set_trailing_metadata(tuple(details_of(error)))
        context.abort(code_of(error), str(error))

    return script


def cancel() -> Script:
    """Cancels a call, as gRPC does with one that arrives while its server stops."""

    def script(server: ScriptedServer, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        context.abort(grpc.StatusCode.CANCELLED, "Cancelled on the server side")

    return script


def hang(*messages: Message) -> Script:
    """Sends messages, then nothing more until the client has left."""

    def script(server: ScriptedServer, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        gone = threading.Event()

        def leave() -> None:
            gone.set()
            server.left.set()

        if not context.add_callback(leave):
            leave()
        yield from messages
        gone.wait(HANG_S)

    return script
