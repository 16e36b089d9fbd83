"""The handling of calls, tested with a small `InferenceService` that has one method of each kind."""

import asyncio
import collections
import logging
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.service.grpc_calls import ENDING, MAX_SENTENCE_BYTES, bounded
from shared.service.grpc_server import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES, GrpcServer
from shared.service.grpc_status import error_of
from shared.service.listening import Address
from tests.asynchronous import async_test
from tests.waiting import eventually

pytestmark = pytest.mark.slow

SERVICE = "inference.v1.InferenceService"
Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
Counts = collections.Counter[tuple[str, str, str | None]]


class Service(inference_pb2_grpc.InferenceServiceServicer):
    """`Tokenize` answers; `Generate` waits for `go_on`, then returns a reason; `GetModel` raises `error`."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go_on = asyncio.Event()
        self.error: Exception = errors.ResourceExhausted("Full.", 2.0)

    async def Tokenize(self, request: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:  # noqa: N802
        return pb.TokenizeResponse(token_ids=list(request.text.encode()))

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> str:  # noqa: N802
        self.entered.set()
        await self.go_on.wait()
        await context.write(pb.GenerateResponse())
        return "EOS"

    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:  # noqa: N802
        raise self.error


class Wire:
    """A server, a channel to it, and the ended calls that were reported."""

    def __init__(self, server: GrpcServer, service: Service, channel: Any, address: str, ends: Counts) -> None:
        self.server, self.service, self.channel, self.address, self.ends = server, service, channel, address, ends
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)

    async def send(self, method: str, raw: bytes, service: str = SERVICE) -> bytes:
        """Sends a request of any bytes, and returns the answer."""
        call = self.channel.unary_unary(f"/{service}/{method}")
        return bytes(await call(raw))

    async def generate(self) -> list[pb.GenerateResponse]:
        return [response async for response in self.stub.Generate(pb.GenerateRequest())]


@asynccontextmanager
async def serving() -> AsyncIterator[Wire]:
    ends: Counts = collections.Counter()
    server = GrpcServer([SERVICE], ended=lambda method, code, reason: ends.update([(method, code.name, reason)]))
    service = Service()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server.server)
    address = f"127.0.0.1:{await server.start(Address('127.0.0.1', 0, 'THE_HOST', 'THE_PORT'))}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield Wire(server, service, channel, address, ends)
    await server.stop(0.0, asyncio.Event())


async def refused(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), str(raised.value.details())


def field(number: int, content: bytes) -> bytes:
    """Encodes a length-delimited protobuf field of at most 127 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


@pytest.mark.parametrize(
    ("method", "raw"),
    [
        # Half of an emoji, as JavaScript may cut a string.
        ("Tokenize", field(1, b"\xed\xa0\xbd")),
        ("Generate", field(1, "😀".encode()[:2])),
        ("GetModel", field(1, field(2, b"\xff"))),
        ("Generate", field(4, b"\x0d\x00")),
        ("Tokenize", b"\x0a\x7f" + b"x"),
        ("Tokenize", b"\xff" * 11),
    ],
)
@async_test
async def test_a_malformed_request_is_an_error_and_counted(
    method: str, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as wire:
        code, details = await refused(wire.send(method, raw))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details.startswith(f"The request of {method} cannot be read: ")
        assert wire.ends == {(method, "INVALID_ARGUMENT", None): 1}
        assert (await wire.stub.Tokenize(pb.TokenizeRequest(text="a"))).token_ids == [97]
    assert not caplog.records


@async_test
async def test_a_malformed_request_to_reflection_is_an_error_too(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as wire:
        call = wire.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        code, details = await refused(anext(aiter(call(iter([field(7, b"\xff")])))))
        assert (code, details.split(":")[0]) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "The request of ServerReflectionInfo cannot be read",
        )
    assert not caplog.records


@pytest.mark.parametrize(
    ("method", "raw", "named"),
    [
        ("Tokenize", field(99 >> 3, b"x"), "field 12 "),
        ("GetModel", field(1, field(9, b"x")), "field model.9 "),
        ("Generate", field(4, field(15, b"x")), "field sampling.15 "),
        ("Generate", field(2, field(3, b"x")), "field prompt_tokens.3 "),
    ],
)
@async_test
async def test_an_unknown_field_is_rejected_by_its_number_in_every_method(method: str, raw: bytes, named: str) -> None:
    async with serving() as wire:
        code, details = await refused(wire.send(method, raw))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert named in details
        assert wire.ends == {(method, "INVALID_ARGUMENT", None): 1}


@async_test
async def test_health_ignores_unknown_fields_as_newer_probes_expect() -> None:
    async with serving() as wire:
        answer = await wire.send("Check", field(15, b"x"), service="grpc.health.v1.Health")
        assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.NOT_SERVING


@async_test
async def test_a_request_that_is_too_large_is_rejected_and_counted() -> None:
    async with serving() as wire:
        code, details = await refused(wire.stub.Tokenize(pb.TokenizeRequest(text="x" * (5 << 20))))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        await eventually(lambda: wire.ends.total() == 1)
        assert wire.ends == {("Tokenize", "CANCELLED", None): 1}


@async_test
async def test_every_call_is_counted_with_its_method_and_code() -> None:
    async with serving() as wire:
        await wire.stub.Tokenize(pb.TokenizeRequest())
        await refused(wire.stub.GetModel(pb.GetModelRequest()))
        wire.service.go_on.set()
        assert len(await wire.generate()) == 1
        wire.service.go_on.clear()
        wire.service.entered.clear()
        left = wire.stub.Generate(pb.GenerateRequest())
        await wire.service.entered.wait()
        left.cancel()
        wire.service.entered.clear()
        # gRPC tells the server 1.01 s.
        late = asyncio.create_task(refused(anext(aiter(wire.stub.Generate(pb.GenerateRequest(), timeout=1.001)))))
        await wire.service.entered.wait()
        assert (await late)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually(lambda: wire.ends.total() == 5)
        assert wire.ends == {
            ("Tokenize", "OK", None): 1,
            ("GetModel", "RESOURCE_EXHAUSTED", None): 1,
            ("Generate", "OK", "EOS"): 1,
            ("Generate", "CANCELLED", None): 1,
            ("Generate", "DEADLINE_EXCEEDED", None): 1,
        }


@async_test
async def test_thousands_of_calls_at_once_are_rejected_with_a_time_to_retry_and_counted() -> None:
    async with serving() as wire:
        # Each channel has its own connection.
        channels = [grpc.aio.insecure_channel(wire.address, options=[("number", number)]) for number in range(3)]
        stubs: list[Any] = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        calls = [stubs[number % 3].GetModel(pb.GetModelRequest()) for number in range(2400)]
        found = [error_of(error, "") for error in await asyncio.gather(*calls, return_exceptions=True)]
        for channel in channels:
            await channel.close()
        assert {(type(error), getattr(error, "retry_after_s", None)) for error in found} == {
            (errors.ResourceExhausted, 2.0)
        }
        assert wire.ends == {("GetModel", "RESOURCE_EXHAUSTED", None): 2400}


@async_test
async def test_new_calls_during_a_drain_are_unavailable_and_running_calls_continue() -> None:
    async with serving() as wire:
        running = asyncio.create_task(wire.generate())
        await wire.service.entered.wait()
        stop = asyncio.create_task(wire.server.stop(1000.0, asyncio.Event()))
        while (found := await code_of(wire.stub.Tokenize(pb.TokenizeRequest()))) is grpc.StatusCode.OK:
            pass
        assert found is grpc.StatusCode.UNAVAILABLE
        calls = [wire.stub.Tokenize(pb.TokenizeRequest()) for _ in range(2000)]
        assert {await refused(call) for call in calls} == {(grpc.StatusCode.UNAVAILABLE, ENDING)}
        stub: Any = health_pb2_grpc.HealthStub(wire.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        wire.service.go_on.set()
        assert len(await running) == 1
        await stop
        assert await code_of(wire.stub.Tokenize(pb.TokenizeRequest())) is grpc.StatusCode.UNAVAILABLE


@async_test
async def test_clients_that_retry_at_once_only_see_unavailable_during_a_stop() -> None:
    async with serving() as wire:
        codes = set()

        async def ask() -> None:
            error = None
            # Until the server no longer listens.
            while "failed to connect" not in str(error):
                try:
                    await wire.stub.Tokenize(pb.TokenizeRequest())
                except grpc.aio.AioRpcError as failure:
                    error = failure
                    codes.add(failure.code())

        clients = [asyncio.create_task(ask()) for _ in range(200)]
        await eventually(lambda: wire.ends.total() > 200)
        await wire.server.stop(1000.0, asyncio.Event())
        await asyncio.gather(*clients)
        assert codes == {grpc.StatusCode.UNAVAILABLE}


@async_test
async def test_calls_that_outlast_the_drain_end_as_unavailable() -> None:
    async with serving() as wire:
        call = refused(anext(aiter(wire.stub.Generate(pb.GenerateRequest()))))
        running = asyncio.create_task(call)
        await wire.service.entered.wait()
        await wire.server.stop(0.0, asyncio.Event())
        assert await running == (grpc.StatusCode.UNAVAILABLE, ENDING)
        assert wire.ends["Generate", "UNAVAILABLE", None] == 1


@async_test
async def test_open_reflection_and_half_sent_calls_do_not_delay_the_stop() -> None:
    async with serving() as wire:
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
        asked = reflection.ServerReflectionInfo()
        await asked.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert len((await asked.read()).list_services_response.service) == 3
        # A call that sends only its headers.
        half_sent = wire.channel.stream_unary(f"/{SERVICE}/Tokenize")()
        await half_sent.wait_for_connection()
        # It has arrived once another call on the connection has an answer.
        await wire.stub.Tokenize(pb.TokenizeRequest())
        await wire.server.stop(1000.0, asyncio.Event())
        assert await refused(asked.read()) == (grpc.StatusCode.UNAVAILABLE, ENDING)
        assert (await refused(half_sent))[0] is grpc.StatusCode.UNAVAILABLE


@async_test
async def test_the_message_of_an_error_is_shortened() -> None:
    async with serving() as wire:
        wire.service.error = errors.InvalidArgument(f"{'😀' * 100_000} is not a label.")
        code, details = await refused(wire.stub.GetModel(pb.GetModelRequest()))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details == "😀" * 249 + "…"


@given(st.text(max_size=40))
def test_a_message_is_cut_only_if_it_must_be(text: str) -> None:
    sentence = text * 40
    encoded = sentence.encode(errors="replace")
    cut = bounded(sentence)
    assert len(cut.encode(errors="replace")) <= MAX_SENTENCE_BYTES
    if len(encoded) <= MAX_SENTENCE_BYTES:
        assert cut == sentence
    else:
        assert encoded.startswith(cut.removesuffix("…").encode())


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@async_test
async def test_a_message_has_at_most_the_bytes_of_the_limit() -> None:
    async with serving() as wire:
        # The field and its length take five bytes.
        largest = "x" * (MAX_MESSAGE_BYTES - 5)
        assert await wire.stub.Tokenize(pb.TokenizeRequest(text=largest)).code() is grpc.StatusCode.OK
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wire.stub.Tokenize(pb.TokenizeRequest(text=f"{largest}x"))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = error_of(refused.value, wire.address)
        assert (type(error), str(error)) == (
            errors.InvalidArgument,
            "The message of this call has more than 4,194,304 bytes, which is the limit of the server.",
        )


@async_test
async def test_metadata_has_at_most_the_bytes_of_the_limit() -> None:
    async with serving() as wire:
        # Each entry counts 32 bytes more, and gRPC has its own ones.
        for size in (MAX_METADATA_BYTES // 2, MAX_METADATA_BYTES - 1024):
            call = wire.stub.Tokenize(pb.TokenizeRequest(), metadata=[("x", "x" * size)])
            assert await call.code() is grpc.StatusCode.OK
        for size in (MAX_METADATA_BYTES - 32, MAX_METADATA_BYTES + 1, 8 * MAX_METADATA_BYTES):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await wire.stub.Tokenize(pb.TokenizeRequest(), metadata=[("x", "secret" + "x" * (size - 6))])
            error = error_of(refused.value, wire.address)
            assert (type(error), str(error)) == (
                errors.InvalidArgument,
                "The metadata of this call has more than 16,384 bytes, which is the limit of the server.",
            )
            assert "secret" not in str(refused.value.details())


@pytest.mark.parametrize("given", ["my-call-1", "!" * 128])
@async_test
async def test_an_answer_and_an_error_return_the_request_id_of_the_client(given: str) -> None:
    metadata = (("x-request-id", given),)
    async with serving() as wire:
        call = wire.stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=metadata)
        await call
        assert (await call.trailing_metadata())["x-request-id"] == given
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await wire.stub.GetModel(pb.GetModelRequest(), metadata=metadata)
        error = error_of(raised.value, wire.address)
        assert isinstance(error, errors.ResourceExhausted)
        assert (error.request_id, error.retry_after_s) == (given, 2.0)


@async_test
async def test_the_sentence_of_an_internal_error_names_the_request_id_of_its_log_lines(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as wire:
        wire.service.error = ValueError("a mistake")
        with caplog.at_level(logging.INFO, "shared"), pytest.raises(grpc.aio.AioRpcError) as raised:
            await wire.stub.GetModel(pb.GetModelRequest())
    made = error_of(raised.value, wire.address).request_id
    assert len(made) == 32
    assert made in str(raised.value.details())
    ended, failed = caplog.records
    assert failed.__dict__["ids"] == {"request_id": made}
    assert ended.getMessage().startswith("GetModel: INTERNAL after 0.")


@async_test
async def test_an_id_that_cannot_stand_in_a_line_is_replaced_in_an_answer() -> None:
    async with serving() as wire:
        call = wire.stub.Tokenize(pb.TokenizeRequest(text="a"), metadata=(("x-request-id", "x" * 129),))
        await call
        assert len((await call.trailing_metadata())["x-request-id"]) == 32
