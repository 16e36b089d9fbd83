"""OpenAI's completions, called by the `openai` package and by curl."""

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from inference_service.client import InferenceClient
from inference_service.http.choices import Choice
from inference_service.http.completions import Completion, CompletionRequest
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.asynchronous import async_test
from tests.decoders import default_weights
from tests.fakes import byte_tokenizer, publish_tiny_version
from tests.inference_service.process import Server, text_of
from tests.waiting import HANG_S, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that serves version 2 of two."""
    server = Server(tmp_path_factory.mktemp("server") / "var")
    try:
        publish_tiny_version(server.registry, 2.0, seed=1)
        wait_until(server.serves)
        publish_tiny_version(server.registry, 1.0, seed=2)
        with server.client() as client:
            wait_until(lambda: client.model().version == 2)
        yield server
    finally:
        assert server.end() == 0, server.lines
        assert "Traceback" not in "".join(server.lines)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.page_url}v1", api_key="none", max_retries=0, timeout=HANG_S) as client:
        yield client


def post(server: Server, content: str | bytes, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.page_url}v1/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
        timeout=HANG_S,
    )


def generated(server: Server, prompt: str, **values: Any) -> tuple[str, list[pb.Delta], list[pb.PromptRead]]:
    """Returns what gRPC answers to a request."""
    with InferenceClient(server.address) as client:
        events = list(client.generate(prompt, **values))
    deltas = [event for event in events if isinstance(event, pb.Delta)]
    return text_of(events), deltas, [event for event in events if isinstance(event, pb.PromptRead)]


def test_a_completion_is_the_text_that_grpc_generates(server: Server, client: openai.OpenAI) -> None:
    values = {"temperature": 0.7, "top_p": 0.9, "seed": 11, "max_tokens": 12}
    answer = client.completions.create(model="2", prompt="Once", extra_body={"top_k": 40, "ignore_eos": True}, **values)  # type: ignore[call-overload]
    text, _, _ = generated(server, "Once", version=2, top_k=40, ignore_eos=True, **values)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text, "length", 0)
    assert answer.model == "2"
    assert answer.system_fingerprint == server.registry.version(2).digest
    assert answer.weight_format == default_weights()
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 12, 16)


def test_a_completion_counts_by_its_end_as_a_call_of_grpc_does(server: Server, client: openai.OpenAI) -> None:
    def ends(reason: str) -> float:
        return server.metrics()["gptloop_inference_requests_total", reason]

    before = {reason: ends(reason) for reason in ("length", "invalid_argument", "not_found", "internal")}
    refused = server.metrics().get(("gptloop_inference_http_requests_total", "404"), 0.0)
    client.completions.create(model="2", prompt="Once", max_tokens=2, extra_body={"ignore_eos": True})
    list(
        client.completions.create(
            model="2", prompt=["a", "b"], max_tokens=2, stream=True, extra_body={"ignore_eos": True}
        )
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="2", prompt="Once", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="77", prompt="Once")
    wait_until(lambda: ends("not_found") == before["not_found"] + 1)
    assert ends("length") == before["length"] + 2
    assert ends("invalid_argument") == before["invalid_argument"] + 1
    assert ends("internal") == before["internal"]
    assert server.metrics()["gptloop_inference_http_requests_total", "404"] == refused + 1


def test_a_stream_has_the_same_text_in_parts_and_then_the_usage(client: openai.OpenAI) -> None:
    values: dict[str, Any] = {"model": "best", "prompt": "Once", "seed": 5, "max_tokens": 20, "n": 2}
    whole = client.completions.create(**values)
    parts = list(client.completions.create(**values, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", ""], [None, None]
    for part in parts[:-1]:
        for choice in part.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage


def test_the_asynchronous_client_streams(server: Server) -> None:
    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.page_url}v1", api_key="none", max_retries=0) as client:
            parts = await client.completions.create(model="", prompt="Once", max_tokens=8, seed=1, stream=True)
            return "".join([part.choices[0].text async for part in parts])

    assert asyncio.run(stream()) == generated(server, "Once", max_tokens=8, seed=1, temperature=1.0)[0]


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI) -> None:
    tokens = [list(b"Once"), list(b"A dog")]
    both = client.completions.create(model="2", prompt=["Once", "A dog"], n=2, seed=3, max_tokens=6)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    for number, prompt in enumerate(tokens):
        for sample in range(2):
            alone = client.completions.create(model="2", prompt=prompt, seed=3 + 2 * number + sample, max_tokens=6)
            assert both.choices[2 * number + sample].text == alone.choices[0].text
    as_tokens = client.completions.create(model="2", prompt=tokens, n=2, seed=3, max_tokens=6)
    assert [choice.text for choice in as_tokens.choices] == [choice.text for choice in both.choices]


@pytest.mark.parametrize("prompt", ["Once upon a time", list(b"Once upon a time")], ids=["text", "tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_scores_every_token(
    server: Server, client: openai.OpenAI, prompt: Any, stream: bool
) -> None:
    values: dict[str, Any] = {"model": "2", "prompt": prompt, "max_tokens": 3, "seed": 1, "logprobs": 2, "echo": True}
    if stream:
        choices = [part.choices[0] for part in client.completions.create(**values, stream=True)]
    else:
        choices = client.completions.create(**values).choices
    text = "".join(choice.text for choice in choices)
    columns = [choice.logprobs for choice in choices if choice.logprobs is not None]
    tokens, logprobs, tops, offsets = (
        [value for each in columns for value in getattr(each, name)]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    told, deltas, reads = generated(
        server, "Once upon a time", version=2, max_tokens=3, seed=1, temperature=1.0, logprobs=2, prompt_logprobs=2
    )
    expected = [each for read in reads for each in read.logprobs] + [each for d in deltas for each in d.logprobs]
    assert text == f"Once upon a time{told}"
    assert logprobs[0] is None
    assert tops[0] is None
    assert logprobs[1:] == pytest.approx([each.logprob for each in expected[1:]], abs=1e-6)
    for top, each in zip(tops[1:], expected[1:], strict=True):
        assert max(top.values()) == pytest.approx(each.alternatives[0].logprob, abs=1e-6)
        assert len(top) <= 2
    assert offsets[:16] == list(range(16))
    assert "".join(tokens[:16]) == "Once upon a time"


def test_an_echo_of_no_tokens_reads_the_prompt_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="2", prompt="Once", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("Once", "length")
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_bytes_that_are_no_character_are_named_as_bytes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="2", prompt=list("é!".encode()), max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert choice.text == "é!"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice.logprobs.text_offset == [0, 0, 1]


def test_offsets_count_the_characters_that_stand_for_wrong_bytes(client: openai.OpenAI) -> None:
    prompt = [0xC3, *b" b", 0xE2, 0x82, 0xFF, *"é".encode(), 0xC3]
    answer = client.completions.create(model="2", prompt=prompt, max_tokens=2, echo=True, logprobs=0, seed=1)
    (choice,) = answer.choices
    assert choice.text.startswith("\ufffd b\ufffd\ufffdé\ufffd")
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[:10] == [0, 1, 2, 3, 3, 4, 5, 5, 6, 7]


def test_a_stop_text_ends_the_text(server: Server, client: openai.OpenAI) -> None:
    text, _, _ = generated(server, "Once", version=2, max_tokens=30, seed=9, temperature=1.0, ignore_eos=True)
    stop = text[5]
    answer = client.completions.create(
        model="2", prompt="Once", max_tokens=30, seed=9, stop=stop, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_models_are_the_labels_and_the_versions(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["best", "latest", "2", "1"]
    assert client.models.retrieve("1").to_dict()["system_fingerprint"] == server.registry.version(1).digest
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        client.models.retrieve("7")


WRONG: list[tuple[dict[str, Any], str, str | None]] = [
    ({"prompt": "x", "nucleus": 1}, "nucleus is not supported; the fields are", "nucleus"),
    ({"prompt": 1}, "prompt: ", "prompt"),
    ({}, "prompt: Field required", "prompt"),
    ({"prompt": []}, "prompt is an empty list", "prompt"),
    ({"prompt": ["x"] * 129}, "prompt has 129 prompts, but the limit is 128", "prompt"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens: Input should be a valid integer", "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0, but must be at least 1", "max_tokens"),
    ({"prompt": "x", "temperature": -1}, "temperature is -1, but must be from 0", "temperature"),
    ({"prompt": "x", "logprobs": 21}, "logprobs is 21, but must be from 0 to 20", "logprobs"),
    ({"prompt": "x", "n": 9}, "n is 9, but must be from 1 to 8", "n"),
    ({"prompt": "x", "stream_options": {"usage": True}}, "stream_options.usage is not supported.", "stream_options"),
    ({"prompt": "x", "best_of": 3}, "best_of is 3, but must equal n, 1", "best_of"),
    ({"prompt": "x", "model": True}, "model: Input should be a valid string, but there is True", "model"),
    ({"prompt": "x" * 96}, "has at least 96 tokens, but must have fewer than 96", "prompt"),
    ({"prompt": [300]}, "prompt contains 300, but version", "prompt"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias: ", "logit_bias"),
]


@pytest.mark.parametrize(("body", "sentence", "param"), WRONG)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_refused_with_a_sentence(
    server: Server, body: dict[str, Any], sentence: str, param: str | None, stream: bool
) -> None:
    answer = post(server, json.dumps({**body, "stream": stream}))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert sentence in error["message"]


def test_a_number_names_a_version_too(server: Server) -> None:
    bodies = [json.dumps({"model": model, "prompt": "Once", "seed": 1}) for model in (1, "1")]
    number, text = (post(server, body).json() for body in bodies)
    assert number["model"] == text["model"] == "1" and number["choices"] == text["choices"]
    assert post(server, json.dumps({"model": 9, "prompt": "x"})).status_code == 404


@pytest.mark.parametrize("model", ["9", "0", "9" * 19, "gpt-3.5-turbo-instruct", "stable"])
def test_a_version_that_does_not_exist_is_not_found(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model=model, prompt="x")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


def test_a_path_that_does_not_exist_is_no_model(server: Server) -> None:
    refused = httpx.get(f"{server.page_url}v1/engines", timeout=HANG_S)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, None)


def test_padding_against_eavesdroppers_may_be_asked_for(server: Server) -> None:
    body = {"prompt": "x", "stream": True, "stream_options": {"include_obfuscation": True}}
    assert post(server, json.dumps(body)).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"null", b'{"prompt": "\\ud800"}'])
def test_a_body_that_is_no_request_is_refused(server: Server, content: bytes) -> None:
    answer = post(server, content)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith(".")


def test_a_body_beyond_the_limit_is_refused(server: Server) -> None:
    assert post(server, b'{"prompt": "' + b"x" * (4 << 20) + b'"}').status_code == 413


def test_a_chat_is_refused_with_the_reason(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="base models, which continue text"):
        client.chat.completions.create(model="best", messages=[{"role": "user", "content": "Hello"}])


def test_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    body = {"prompt": "Once", "max_tokens": 10**6, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.page_url}v1/completions", json=body, timeout=HANG_S) as answer:
        next(answer.iter_lines())
        # The context of a tiny version is full soon, so other streams keep it busy.
    wait_until(lambda: server.metrics()[("gptloop_inference_active_streams",)] == 0)


def test_a_batch_as_large_as_it_may_be_is_answered(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="2", prompt=["Once"] * 128, n=8, max_tokens=1, seed=1)
    assert [choice.index for choice in answer.choices] == list(range(128 * 8))


@async_test
async def test_other_streams_go_on_between_the_choices_of_a_response() -> None:
    choices = [Choice(index, byte_tokenizer(), True, False) for index in range(5)]
    writing = asyncio.create_task(Completion(CompletionRequest.model_validate({"prompt": "x"})).whole(choices))
    turns = 0
    while not writing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > len(choices)
    assert [choice["index"] for choice in json.loads(await writing)["choices"]] == list(range(5))


def test_curl_gets_an_answer(server: Server) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    call = ("-s", f"{server.page_url}v1/completions", "-H", "content-type: application/json")
    body = '{"prompt": "Once", "max_tokens": 2, "ignore_eos": true}'
    answer = subprocess.run([curl, *call, "-d", body], capture_output=True, check=True, timeout=HANG_S)
    assert json.loads(answer.stdout)["usage"]["completion_tokens"] == 2


def test_the_likelihood_of_a_text_is_that_of_its_tokens(server: Server, client: openai.OpenAI) -> None:
    """As lm-evaluation-harness asks: one token more, which it drops."""
    answer = client.completions.create(
        model="2", prompt=[list(b"Once upon")], max_tokens=1, echo=True, logprobs=1, temperature=0.0, seed=1
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    total = math.fsum(value or 0.0 for value in (logprobs.token_logprobs or ())[1:-1])
    _, _, reads = generated(server, "Once upon", version=2, max_tokens=1, prompt_logprobs=0)
    told = [each.logprob for read in reads for each in read.logprobs if each.rank]
    assert total == pytest.approx(math.fsum(told), abs=1e-5)
