"""Both clients, on a server that follows a script and on a real one."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import grpc
import pytest
from google.protobuf.message import Message

from inference_service.client import AsyncInferenceClient, InferenceClient
from inference_service.client.client import Parameters
from inference_service.client.completion import FinishReason
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.asynchronous import async_test
from tests.fakes import publish_tiny_version
from tests.inference_service.process import BREAKABLE, Server
from tests.inference_service.scripted_server import STARTED, STORY, ScriptedServer, Serve, send
from tests.waiting import HANG_S, eventually, wait_until

pytestmark = pytest.mark.slow

Use = Callable[..., Any]


# Requests and results.


def test_every_field_of_the_contract_is_a_parameter() -> None:
    request = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name) - {"prompt", "prompt_tokens", "model", "sampling"}
    model, sampling = pb.ModelSelector.DESCRIPTOR.fields_by_name, pb.Sampling.DESCRIPTOR.fields_by_name
    assert set(get_type_hints(Parameters)) == {*request, *model, *sampling, "timeout_s"}


def test_every_parameter_reaches_its_field(serve: Serve, use: Use) -> None:
    server = serve(send(*STORY, pb.Finished(index=1), pb.Finished(index=2)))
    sampling: dict[str, Any] = {
        "seed": 2**64 - 1,
        "temperature": 0.0,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.25,
        "repetition_penalty": 1.5,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "logit_bias": {7: -100.0, 8: 1.5},
    }
    rest: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["x", "y"],
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 0,
        "n": 3,
    }
    use(server.address, "generate", "Once", version=4, timeout_s=50.0, **sampling, **rest)
    use(server.address, "generate", [1, 2], label="best", **dict.fromkeys([*sampling, *rest]))
    use(server.address, "tokenize", "Once", label="latest")
    use(server.address, "detokenize", [1, 2], version=4)
    use(server.address, "model", version=4)
    every_field, only_tokens, tokenize, detokenize, model = server.requests
    assert set(sampling) == set(pb.Sampling.DESCRIPTOR.fields_by_name)
    assert every_field == pb.GenerateRequest(
        prompt="Once", model=pb.ModelSelector(version=4), sampling=pb.Sampling(**sampling), **rest
    )
    assert only_tokens == pb.GenerateRequest(
        prompt_tokens=pb.TokenIds(ids=[1, 2]), model=pb.ModelSelector(label="best"), sampling=pb.Sampling()
    )
    assert tokenize == pb.TokenizeRequest(text="Once", model=pb.ModelSelector(label="latest"))
    assert detokenize == pb.DetokenizeRequest(token_ids=[1, 2], model=pb.ModelSelector(version=4))
    assert model == pb.GetModelRequest(model=pb.ModelSelector(version=4))
    # gRPC rounds the timeout up to tenths of a second.
    assert 40 < server.remaining_s[0] < 50.2 < server.remaining_s[1]


def test_a_single_stop_text_is_one_stop(serve: Serve, use: Use) -> None:
    server = serve(send(*STORY))
    use(server.address, "generate", "x", stop="The end")
    assert server.requests == [pb.GenerateRequest(prompt="x", sampling=pb.Sampling(), stop=["The end"])]


@pytest.mark.parametrize(
    ("method", "parameters", "sentence"),
    [
        ("generate", {"version": 1, "label": "best"}, "version 1 and label 'best' exclude each other"),
        ("model", {"version": 1, "label": "best"}, "version 1 and label 'best' exclude each other"),
        ("generate", {"max_tokens": 2**40}, "cannot be sent: .*range"),
        ("generate", {"temperature": "hot"}, "cannot be sent: "),
        ("generate", {"temprature": 1.0}, "cannot be sent: .*temprature.*[^.].$"),
        ("model", {"version": 2**70}, "cannot be sent: .*range"),
        ("generate", {"timeout_s": 0}, "timeout_s is 0, but"),
        ("model", {"timeout_s": -1}, "timeout_s is -1, but"),
    ],
)
def test_a_value_that_does_not_fit_its_field_is_rejected_before_sending(
    serve: Serve, use: Use, method: str, parameters: dict[str, Any], sentence: str
) -> None:
    server = serve(send(*STORY))
    with pytest.raises(errors.InvalidArgument, match=sentence):
        use(server.address, method, *["x"] * (method == "generate"), **parameters)
    assert server.requests == []


def test_a_completion_separates_its_samples(serve: Serve, use: Use) -> None:
    logprobs = [pb.TokenLogprobs(logprob=-float(number), rank=number) for number in range(1, 5)]
    ends = [
        pb.Finished(
            index=index,
            reason=reason,
            matched_stop=stop,
            prompt_tokens=3,
            generated_tokens=2,
            queue_seconds=0.25,
            time_to_first_token_seconds=0.5,
            total_seconds=1.0 + index,
            cached_prompt_tokens=1,
        )
        for index, reason, stop in ((0, pb.FINISH_REASON_STOP, "end"), (1, pb.FINISH_REASON_EOS, ""))
    ]
    server = serve(
        send(
            STARTED,
            pb.Delta(index=0, text="a", token_ids=[1], logprobs=logprobs[:1]),
            pb.Delta(index=1, text="x", token_ids=[2], logprobs=logprobs[1:2]),
            pb.Delta(index=1, text="y", token_ids=[3], logprobs=logprobs[2:3]),
            ends[1],
            pb.Delta(index=0, text="b", token_ids=[4], logprobs=logprobs[3:]),
            ends[0],
        )
    )
    completion = use(server.address, "complete", "x", n=2)
    assert (completion.request_id, completion.version, completion.prompt_tokens) == ("r1", 7, 3)
    assert completion.seed == 2**64 - 1
    first, second = completion.samples
    assert (first.index, first.text, first.token_ids, first.logprobs) == (0, "ab", (1, 4), (logprobs[0], logprobs[3]))
    assert (second.index, second.text, second.token_ids, second.logprobs) == (1, "xy", (2, 3), tuple(logprobs[1:3]))
    assert (first.finish_reason, first.matched_stop) == (FinishReason.STOP, "end")
    assert (second.finish_reason, second.matched_stop) == (FinishReason.EOS, None)
    # Seeds have 64 bits.
    assert (first.seed, second.seed) == (2**64 - 1, 0)
    assert (first.generated_tokens, first.cached_prompt_tokens) == (2, 1)
    assert (first.queue_s, first.time_to_first_token_s, first.total_s, second.total_s) == (0.25, 0.5, 1.0, 2.0)
    assert completion.text == "ab"


def test_every_finish_reason_of_the_contract_has_a_name() -> None:
    assert {f"FINISH_REASON_{reason.name}": reason.value for reason in FinishReason} == {
        name: number for name, number in pb.FinishReason.items() if number != pb.FINISH_REASON_UNSPECIFIED
    }


def test_threads_share_a_client(serve: Serve) -> None:
    # No call ends before all have begun, so that they run at the same time.
    together = threading.Barrier(8, timeout=HANG_S)

    def echo(server: ScriptedServer, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        assert isinstance(request, pb.GenerateRequest)
        together.wait()
        yield pb.Delta(text=request.prompt)
        yield pb.Finished()

    server = serve(echo)
    with InferenceClient(server.address) as client, ThreadPoolExecutor(8) as pool:
        texts = pool.map(lambda prompt: "".join(client.generate(prompt).text()), "abcdefgh")
        assert list(texts) == list("abcdefgh")


def test_an_async_client_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncInferenceClient("127.0.0.1:1")


@async_test
async def test_an_async_client_belongs_to_one_loop(serve: Serve) -> None:
    server = serve(send(*STORY))

    async def call(client: AsyncInferenceClient) -> None:
        with pytest.raises(errors.FailedPrecondition, match="another event loop"):
            client.generate("x")
        with pytest.raises(errors.FailedPrecondition, match="another event loop"):
            await client.model()

    async with AsyncInferenceClient(server.address) as client:
        await asyncio.to_thread(lambda: asyncio.run(call(client)))
    assert server.requests == []


# A real server.


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server") / "var", BREAKABLE)
    try:
        publish_tiny_version(server.registry, 1.0)
        wait_until(server.serves)
        yield server
    finally:
        assert server.end() == 0, server.lines


def test_a_completion_equals_its_stream(server: Server, use: Use) -> None:
    completion = use(server.address, "complete", "Once", max_tokens=12, ignore_eos=True, logprobs=1)
    (sample,) = completion.samples
    assert len(sample.token_ids) == len(sample.logprobs) == sample.generated_tokens == 12
    assert (sample.finish_reason, sample.seed) == (FinishReason.LENGTH, completion.seed)
    events = use(
        server.address,
        "generate",
        "Once",
        max_tokens=12,
        ignore_eos=True,
        seed=completion.seed,
        version=completion.version,
    )
    assert completion.text == "".join(event.text for event in events if isinstance(event, pb.Delta))


def test_the_seed_of_a_sample_reproduces_its_text(server: Server, use: Use) -> None:
    options = {"max_tokens": 12, "ignore_eos": True}
    completion = use(server.address, "complete", "Once", n=3, seed=2**64 - 2, **options)
    assert [sample.index for sample in completion.samples] == [0, 1, 2]
    texts = [sample.text for sample in completion.samples]
    assert len(set(texts)) == 3
    alone = [use(server.address, "complete", "Once", seed=sample.seed, **options) for sample in completion.samples]
    assert [completion.text for completion in alone] == texts


@async_test
async def test_streams_that_are_left_free_their_slots(server: Server) -> None:
    async def leave(client: AsyncInferenceClient) -> None:
        async with client.generate("Once", max_tokens=90, ignore_eos=True) as stream:
            await anext(stream)

    async with AsyncInferenceClient(server.address) as client:
        await asyncio.gather(*(leave(client) for _ in range(20)))
    await eventually(lambda: server.metrics()["gptloop_inference_active_streams",] == 0)
    assert server.metrics()["gptloop_inference_waiting_requests",] == 0


def test_the_server_ends_a_call_at_its_deadline(server: Server, use: Use) -> None:
    server.order("pause")
    with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.5 s"):
        use(server.address, "complete", "Once", max_tokens=90, ignore_eos=True, timeout_s=0.5)
