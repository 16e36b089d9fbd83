import tracemalloc
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_service.draft import Selection
from inference_service.engine.request import Delta, Draw, Finished, FinishReason, GenerationRequest, TokenLogprob
from inference_service.grpc import translate
from shared.decoding.sampling import SamplingParameters
from shared.errors import InvalidArgument
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.fakes import byte_tokenizer

CONTEXT = 16


def complete(message: pb.GenerateRequest) -> GenerationRequest:
    return translate.draft_from_pb(message, None, slots=4).complete(3, byte_tokenizer(), CONTEXT, seed=5)


def test_absent_fields_have_the_defaults_of_the_contract() -> None:
    draft = translate.draft_from_pb(pb.GenerateRequest(prompt="Once"), None, slots=4)
    assert draft.selection == Selection()
    options, sampling = draft.options, draft.options.sampling
    assert (options.max_tokens, options.min_tokens, options.stop, draft.seed) == (256, 0, (), None)
    assert (options.ignore_eos, options.logprobs, options.deadline) == (False, None, None)
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.8, 0, 1.0, 0.0)
    assert sampling.repetition_penalty == 1.0


def test_zeros_are_not_replaced_by_defaults() -> None:
    message = pb.GenerateRequest(prompt="x", logprobs=0, sampling=pb.Sampling(temperature=0.0, seed=0))
    draft = translate.draft_from_pb(message, None, slots=4)
    assert (draft.options.logprobs, draft.options.sampling.temperature, draft.seed) == (0, 0.0, 0)


def test_every_field_is_translated() -> None:
    message = pb.GenerateRequest(
        prompt_tokens=pb.TokenIds(ids=[1, 2]),
        model=pb.ModelSelector(version=4),
        sampling=pb.Sampling(
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=2.0,
            presence_penalty=0.75,
            frequency_penalty=-0.5,
            logit_bias={7: 1.5, 4: -100.0},
            seed=2**64 - 1,
        ),
        max_tokens=9,
        min_tokens=2,
        stop=["a", "b"],
        ignore_eos=True,
        logprobs=20,
        prompt_logprobs=0,
        n=3,
    )
    draft = translate.draft_from_pb(message, 10.0, slots=4)
    assert draft.selection == Selection(version=4)
    assert draft.seed == 2**64 - 1
    expected = GenerationRequest(
        id=draft.options.id,
        call_id=draft.options.call_id,
        version=3,
        prompt=(1, 2),
        seed=5,
        max_tokens=9,
        arrived=draft.options.arrived,
        samples=3,
        sampling=SamplingParameters(
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=2.0,
            presence_penalty=0.75,
            frequency_penalty=-0.5,
            logit_bias=((4, -100.0), (7, 1.5)),
        ),
        min_tokens=2,
        stop=("a", "b"),
        ignore_eos=True,
        logprobs=20,
        prompt_logprobs=0,
        deadline=draft.options.arrived + 10.0,
    )
    assert draft.complete(3, byte_tokenizer(), CONTEXT, seed=5) == expected
    # Each value differs from its default, so it was translated.
    assert all(getattr(expected, field.name) != field.default for field in fields(expected))
    assert all(getattr(expected.sampling, field.name) != field.default for field in fields(expected.sampling))


WRONG: list[tuple[str, pb.GenerateRequest]] = [
    ("max_tokens is 0", pb.GenerateRequest(prompt="x", max_tokens=0)),
    ("max_tokens is -1", pb.GenerateRequest(prompt="x", max_tokens=-1)),
    ("min_tokens is -1", pb.GenerateRequest(prompt="x", min_tokens=-1)),
    (
        "min_tokens is 5, but must be from 0 to max_tokens \\(4\\)",
        pb.GenerateRequest(prompt="x", max_tokens=4, min_tokens=5),
    ),
    ("logprobs is 21", pb.GenerateRequest(prompt="x", logprobs=21)),
    ("logprobs is -1", pb.GenerateRequest(prompt="x", logprobs=-1)),
    ("stop contains an empty text", pb.GenerateRequest(prompt="x", stop=["a", ""])),
    ("stop has 17 texts", pb.GenerateRequest(prompt="x", stop=["a"] * 17)),
    ("stop contains a text of 257", pb.GenerateRequest(prompt="x", stop=["a" * 257])),
    ("top_p is 1.5", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(top_p=1.5))),
    ("temperature is -1", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(temperature=-1))),
    ("temperature is nan", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(temperature=float("nan")))),
    ("presence_penalty is 2.5", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(presence_penalty=2.5))),
    ("frequency_penalty is nan", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(frequency_penalty=float("nan")))),
    ("logit_bias of token 7 is 101", pb.GenerateRequest(prompt="x", sampling=pb.Sampling(logit_bias={7: 101.0}))),
    (
        "logit_bias has 301 tokens",
        pb.GenerateRequest(prompt="x", sampling=pb.Sampling(logit_bias=dict.fromkeys(range(301), 1.0))),
    ),
    ("n is 0", pb.GenerateRequest(prompt="x", n=0)),
    ("n is 5, but must be from 1 to 4, the samples", pb.GenerateRequest(prompt="x", n=5)),
    ("model.version is 0", pb.GenerateRequest(prompt="x", model=pb.ModelSelector(version=0))),
]


@pytest.mark.parametrize(("sentence", "message"), WRONG, ids=[sentence for sentence, _ in WRONG])
def test_an_invalid_field_is_named(sentence: str, message: pb.GenerateRequest) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        translate.draft_from_pb(message, None, slots=4)


def test_a_request_without_a_prompt_is_rejected() -> None:
    with pytest.raises(InvalidArgument, match="neither prompt nor prompt_tokens"):
        translate.draft_from_pb(pb.GenerateRequest(), None, slots=4)


@pytest.mark.parametrize(
    "message", [pb.GenerateRequest(prompt=""), pb.GenerateRequest(prompt_tokens=pb.TokenIds())], ids=["text", "tokens"]
)
def test_an_empty_prompt_becomes_the_end_token(message: pb.GenerateRequest) -> None:
    assert complete(message).prompt == (256,)


def test_a_text_prompt_contains_no_special_tokens() -> None:
    assert complete(pb.GenerateRequest(prompt="<|endoftext|>")).prompt == tuple(b"<|endoftext|>")


@given(st.integers(0, 40))
def test_a_prompt_must_be_shorter_than_the_context(length: int) -> None:
    for message in (
        pb.GenerateRequest(prompt="x" * length),
        pb.GenerateRequest(prompt_tokens=pb.TokenIds(ids=[7] * length)),
    ):
        if length < CONTEXT:
            assert len(complete(message).prompt) == max(length, 1)
        else:
            with pytest.raises(InvalidArgument, match=f"{length} .*fewer than {CONTEXT}, the context length"):
                complete(message)


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(prompt_tokens=pb.TokenIds(ids=[7] * 1_000_000)),
        pb.GenerateRequest(prompt="x", sampling=pb.Sampling(logit_bias=dict.fromkeys(range(100_000), 1.0))),
    ],
    ids=["tokens", "biases"],
)
def test_a_request_that_is_too_large_is_rejected_without_copying_it(message: pb.GenerateRequest) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match=r"1000000 tokens|100000 tokens"):
            complete(message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("token", [-1, 257])
def test_a_token_outside_the_vocabulary_is_rejected(token: int) -> None:
    with pytest.raises(InvalidArgument, match=f"prompt_tokens contains {token}, but version 3 has the tokens 0 to 256"):
        complete(pb.GenerateRequest(prompt_tokens=pb.TokenIds(ids=[1, token])))


@pytest.mark.parametrize("token", [-1, 257])
def test_a_bias_outside_the_vocabulary_is_rejected(token: int) -> None:
    with pytest.raises(InvalidArgument, match=f"logit_bias contains token {token}, but version 3 has the tokens 0 to"):
        complete(pb.GenerateRequest(prompt="x", sampling=pb.Sampling(logit_bias={token: 1.0})))


def test_a_delta_carries_text_tokens_and_logprobs() -> None:
    draws = (Draw(5, -0.5, 2, (TokenLogprob(6, -0.25),)), Draw(7, -1.0, 4))
    delta = translate.delta_to_pb(Delta((0.0, 1.0), "hé", draws), index=3).delta
    assert (delta.text, list(delta.token_ids), delta.index) == ("hé", [5, 7], 3)
    assert [one.rank for one in delta.logprobs] == [2, 4]
    assert [one.logprob for one in delta.logprobs] == [-0.5, -1.0]
    assert delta.logprobs[0].alternatives[0] == pb.TokenLogprob(token_id=6, logprob=-0.25)
    assert not translate.delta_to_pb(Delta((0.0,), "a", (Draw(5),)), index=0).delta.logprobs


@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_number(reason: FinishReason) -> None:
    finished = Finished(reason, None, 9, 8, 2, 0.5, 0.75, 1.0)
    message = translate.finished_to_pb(finished, index=1).finished
    assert (message.index, message.prompt_tokens, message.cached_prompt_tokens, message.generated_tokens) == (
        1,
        9,
        8,
        2,
    )
    assert pb.FinishReason.Name(message.reason) == f"FINISH_REASON_{reason.name}"
    assert (message.queue_seconds, message.time_to_first_token_seconds, message.total_seconds) == (0.5, 0.75, 1.0)
