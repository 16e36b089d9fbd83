"""Encoding and decoding for clients: limited, one call at a time, with tokenizers of verified versions."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service import codec
from inference_service.admission import Admission
from inference_service.client_limits import ClientLimits
from inference_service.codec import MAX_TEXT_BYTES, MAX_TOKENS, MAX_WAITING, Codec
from inference_service.generation import Generations
from inference_service.grpc.servicer import InferenceServicer
from inference_service.grpc.translate import draft_from_pb
from inference_service.pauses import Pauses
from inference_service.versions.resident import Resident
from inference_service.write_timeouts import WriteTimeouts
from shared.decoding.weight_format import WeightFormat
from shared.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from shared.gpt.tokenizer import Tokenizer
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.asynchronous import async_test
from tests.fakes import byte_tokenizer, publish_tiny_version
from tests.inference_service.world import World
from tests.registries import version_folder
from tests.shared.registry.scenarios import make_manifest
from tests.waiting import HANG_S, eventually

# The largest message that a gRPC client accepts by default.
CLIENT_LIMIT_BYTES = 4 << 20
# A tokenizer with a token of four bytes.
LONG = Tokenizer("long", byte_tokenizer().pattern, [*(bytes([value]) for value in range(256)), b"text"])


def resident(tokenizer: Tokenizer) -> Resident:
    return Resident(make_manifest(3, model={"context_length": 8}), tokenizer, 1.0, 0, WeightFormat.FP32)


async def tokenize(text: str, tokenizer: Tokenizer) -> pb.TokenizeResponse:
    return await Codec().tokenize(pb.TokenizeRequest(text=text), resident(tokenizer))


async def detokenize(tokens: list[int], tokenizer: Tokenizer) -> pb.DetokenizeResponse:
    return await Codec().detokenize(pb.DetokenizeRequest(token_ids=tokens), resident(tokenizer))


@given(st.text(max_size=50))
@async_test
async def test_decoding_reverses_encoding(text: str) -> None:
    answer = await tokenize(text, byte_tokenizer())
    assert answer.model_version == 3
    text_again = await detokenize(list(answer.token_ids), byte_tokenizer())
    assert text_again == pb.DetokenizeResponse(text=text, model_version=3)


@async_test
async def test_invalid_bytes_are_replaced_and_the_end_token_is_empty() -> None:
    answer = await detokenize([0xE9, 256, ord("a")], byte_tokenizer())
    assert answer.text == "\N{REPLACEMENT CHARACTER}a"


@async_test
async def test_clients_accept_the_longest_answers() -> None:
    # Each byte is a token, and most of these tokens take two bytes in a message.
    longest = await tokenize("\N{LATIN SMALL LETTER E WITH ACUTE}" * (MAX_TEXT_BYTES // 2), byte_tokenizer())
    assert len(longest.token_ids) == MAX_TEXT_BYTES
    replaced = await detokenize([0xFF] * MAX_TOKENS, byte_tokenizer())
    assert len(replaced.text) == MAX_TOKENS
    for answer in (longest, replaced):
        assert answer.ByteSize() <= CLIENT_LIMIT_BYTES


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: tokenize("é" * (MAX_TEXT_BYTES // 2) + "a", byte_tokenizer()),
            "text has 1048577 bytes, but the limit",
        ),
        (
            lambda: detokenize([0] * (MAX_TOKENS + 1), byte_tokenizer()),
            "token_ids has 1048577 tokens, but the limit",
        ),
        (lambda: detokenize([1, -1], byte_tokenizer()), "token_ids contains -1, but version 3 has the tokens 0 to 256"),
        (lambda: detokenize([2**31 - 1], byte_tokenizer()), "token_ids contains 2147483647, but version 3 has"),
        (lambda: detokenize([256] * 500_000, LONG), "token_ids stands for 2000000 bytes of text, but"),
    ],
)
@async_test
async def test_invalid_requests_are_rejected_with_one_sentence(
    call: Callable[[], Awaitable[object]], sentence: str
) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        await call()


class HeldTokenizer(Tokenizer):
    """A tokenizer that encodes once `go_on` is set, and counts its calls and the most at the same time."""

    def __init__(self) -> None:
        super().__init__("held", LONG.pattern, LONG.vocabulary[:-1])
        self.go_on = threading.Event()
        self.calls = 0
        self.most = 0
        self._now = 0

    def encode(self, text: str) -> list[int]:
        self._now += 1
        self.calls += 1
        self.most = max(self.most, self._now)
        assert self.go_on.wait(HANG_S)
        self._now -= 1
        return [1]


@async_test
async def test_texts_are_encoded_one_at_a_time_and_only_a_few_may_wait() -> None:
    held = HeldTokenizer()
    one = Codec()

    def tokenize() -> "asyncio.Task[pb.TokenizeResponse]":
        return asyncio.create_task(one.tokenize(pb.TokenizeRequest(text="x"), resident(held)))

    tasks = [tokenize() for _ in range(MAX_WAITING)]
    await eventually(lambda: held.calls == 1)
    with pytest.raises(ResourceExhausted, match=f"{MAX_WAITING} texts are waiting already") as rejected:
        await tokenize()
    assert rejected.value.retry_after_s == codec._RETRY_AFTER_S
    # A cancelled call frees its place, and its text is not encoded.
    for task in tasks[1:]:
        task.cancel()
    await asyncio.wait(tasks[1:])
    last = tokenize()
    held.go_on.set()
    assert (await last).token_ids == (await tasks[0]).token_ids == [1]
    assert (held.calls, held.most) == (2, 1)


@async_test
async def test_a_prompt_does_not_wait_behind_a_text() -> None:
    held = HeldTokenizer()
    one = Codec()
    text = asyncio.create_task(one.tokenize(pb.TokenizeRequest(text="x"), resident(held)))
    await eventually(lambda: held.calls == 1)
    draft = draft_from_pb(pb.GenerateRequest(prompt="ab"), None, slots=1)
    assert (await one.complete(draft, resident(byte_tokenizer()), seed=5)).prompt == (97, 98)
    held.go_on.set()
    await text


def servicer(world: World) -> InferenceServicer:
    admission, codec = Admission(1, 1, world.metrics.waiting_requests), Codec()
    limits = ClientLimits(2, 0, 0, world.metrics)
    generations = Generations(
        world.catalogue, world.engine, world.residents, limits, admission, codec, world.metrics, lambda *_: None
    )
    timeouts = WriteTimeouts(1.0, Pauses())
    return InferenceServicer(generations, world.catalogue, world.residents, codec, timeouts)


@async_test
async def test_only_verified_tokenizers_are_used(fresh: World) -> None:
    publish_tiny_version(fresh.registry, 1.0)
    changed = publish_tiny_version(fresh.registry, 2.0)
    other = Tokenizer("other", byte_tokenizer().pattern, [bytes([255 - value]) for value in range(256)])
    other.save(version_folder(fresh.registry, changed.version) / "tokenizer.json")

    nobody: Any = SimpleNamespace(invocation_metadata=lambda: ())
    async with fresh.running(1):
        service = servicer(fresh)
        assert (await service.Tokenize(pb.TokenizeRequest(text="a"), nobody)).token_ids == [97]
        model = pb.ModelSelector(version=changed.version)
        with pytest.raises(FailedPrecondition, match=r"tokenizer\.json has changed"):
            await service.Tokenize(pb.TokenizeRequest(text="a", model=model), nobody)
        with pytest.raises(FailedPrecondition, match=r"tokenizer\.json has changed"):
            await service.Detokenize(pb.DetokenizeRequest(token_ids=[97], model=model), nobody)
