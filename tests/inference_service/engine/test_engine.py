"""The output of a stream of the engine."""

import math
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from inference_service.engine.request import FinishReason
from shared.decoding.sampling import SamplingParameters, adjust
from tests.fakes import TINY, tiny_model
from tests.inference_service.engine.harness import Harness, request


def test_bias_and_penalties_change_what_is_drawn(harness: Harness) -> None:
    greedy = SamplingParameters(temperature=0.0)
    certain = replace(greedy, logit_bias=((ord("q"), 100.0),))
    tired = replace(certain, logit_bias=((ord("q"), 20.0),), frequency_penalty=2.0)
    (biased,) = harness.generate(request("biased", sampling=certain))
    (plain,) = harness.generate(request("plain", sampling=greedy))
    (penalised,) = harness.generate(request("penalised", sampling=tired))
    assert biased.tokens == [ord("q")] * 20
    assert ord("q") not in plain.tokens
    # After this many draws the penalty outweighs the bias.
    assert penalised.tokens[0] == ord("q") != penalised.tokens[-1]
    assert penalised.tokens.count(ord("q")) < 15


@pytest.mark.parametrize(
    "changed",
    [
        SamplingParameters(temperature=0.0, repetition_penalty=1.5),
        SamplingParameters(temperature=0.0, presence_penalty=2.0),
        SamplingParameters(temperature=0.0, frequency_penalty=1.0),
        SamplingParameters(temperature=0.0, logit_bias=((ord("q"), 1.0), (ord("z"), 2.0))),
    ],
    ids=["repetition penalty", "presence penalty", "frequency penalty", "logit bias"],
)
def test_greedy_tokens_are_the_likeliest_after_penalties_and_bias(
    harness: Harness, changed: SamplingParameters
) -> None:
    greedy = SamplingParameters(temperature=0.0)
    plain, result = harness.generate(request("plain", sampling=greedy), request("changed", sampling=changed))
    assert result.tokens != plain.tokens
    model = tiny_model(0)
    for place, token in enumerate(result.tokens):
        before = result.tokens[:place]
        logits = np.array(model(mx.array([[*b"Once", *before]]))[0, -1])
        adjusted = adjust(logits, changed, list(b"Once"), Counter(before))
        adjusted[256] = -np.inf
        assert int(np.argmax(adjusted)) == token


HOT = SamplingParameters(temperature=3.0)


@pytest.mark.parametrize(
    "filtering",
    [replace(HOT, top_k=1), replace(HOT, top_p=1e-6), replace(HOT, min_p=1.0)],
    ids=["top_k", "top_p", "min_p"],
)
def test_a_filter_that_leaves_one_token_draws_the_likeliest(harness: Harness, filtering: SamplingParameters) -> None:
    greedy, filtered, free = harness.generate(
        request("greedy", sampling=SamplingParameters(temperature=0.0)),
        request("filtered", sampling=filtering),
        request("free", sampling=HOT),
    )
    assert filtered.tokens == greedy.tokens != free.tokens


@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_logprobs_do_not_change_the_tokens(harness: Harness, temperature: float) -> None:
    sampling = SamplingParameters(temperature=temperature)
    plain, told, filtered = harness.generate(
        request("plain", sampling=sampling),
        request("told", sampling=sampling, logprobs=1),
        request("filtered", sampling=replace(sampling, top_k=256)),
    )
    assert plain.tokens == told.tokens == filtered.tokens


def test_the_rank_counts_all_tokens(harness: Harness) -> None:
    (result,) = harness.generate(request("a", logprobs=20, sampling=SamplingParameters(temperature=3.0)))
    for draw in result.draws:
        better = [other for other in draw.alternatives if draw.logprob is not None and other.logprob > draw.logprob]
        assert draw.rank is not None
        assert len(better) == min(draw.rank - 1, 20)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(harness: Harness) -> None:
    first, second, third = harness.generate(request("a"), request("b"), request("c", seed=99))
    assert first.tokens == second.tokens != third.tokens


def test_greedy_tokens_agree_with_a_full_forward(harness: Harness) -> None:
    (result,) = harness.generate(request("a", sampling=SamplingParameters(temperature=0.0)))
    model = tiny_model(0)
    tokens = list(b"Once")
    for token in result.tokens:
        logits = model(mx.array([tokens]))[0, -1]
        logits[256] = -mx.inf
        assert int(mx.argmax(logits)) == token
        tokens.append(token)


def test_generation_ends_before_a_stop_text(harness: Harness) -> None:
    (whole,) = harness.generate(request("whole", max_tokens=40))
    stop = whole.text[10:13]
    (stopped,) = harness.generate(request("stopped", max_tokens=40, stop=(stop, "never so")))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finished.reason, stopped.finished.matched_stop) == (FinishReason.STOP, stop)


def test_the_end_token_ends_a_stream_unless_it_is_forbidden(harness: Harness) -> None:
    # A penalty below 1 on a prompt full of end tokens makes the end token certain.
    likely = SamplingParameters(temperature=0.0, repetition_penalty=0.001)
    prompt = (256,) * 8
    ended, later, never = harness.generate(
        replace(request("ended"), prompt=prompt, sampling=likely, ignore_eos=False),
        replace(request("later"), prompt=prompt, sampling=likely, ignore_eos=False, min_tokens=5),
        replace(request("never"), prompt=prompt, sampling=likely),
    )
    assert (ended.finished.reason, ended.tokens) == (FinishReason.EOS, [256])
    assert 256 not in later.tokens[:5]
    assert never.finished.reason is FinishReason.LENGTH
    assert 256 not in never.tokens


@pytest.mark.parametrize("least", [0, 1, 5])
def test_a_certain_end_token_comes_right_after_min_tokens(harness: Harness, least: int) -> None:
    certain = SamplingParameters(logit_bias=((256, 100.0),))
    (result,) = harness.generate(request("a", sampling=certain, min_tokens=least, ignore_eos=False))
    assert result.tokens.index(256) == least == len(result.tokens) - 1
    assert result.finished.reason is FinishReason.EOS


def test_the_context_ends_a_stream(harness: Harness) -> None:
    (result,) = harness.generate(request("a", "x" * (TINY.context_length - 3), max_tokens=50))
    assert result.finished.reason is FinishReason.CONTEXT_LENGTH
    assert result.finished.generated_tokens == len(result.tokens) == 3


def test_logprobs_agree_with_the_model(harness: Harness) -> None:
    (result,) = harness.generate(request("a", logprobs=3, sampling=SamplingParameters(temperature=0.5), max_tokens=10))
    model = tiny_model(0)
    logits = model(mx.array([[*b"Once", *result.tokens]]))[0].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, draw in enumerate(result.draws):
        row = np.asarray(expected[3 + i])
        assert draw.logprob == pytest.approx(float(row[draw.token]), abs=1e-4)
        assert [other.logprob for other in draw.alternatives] == pytest.approx(
            np.sort(row)[::-1][:3].tolist(), abs=1e-4
        )


def test_all_alternatives_sum_to_one(harness: Harness) -> None:
    (result,) = harness.generate(request("a", logprobs=257, max_tokens=1))
    assert sum(math.exp(other.logprob) for other in result.draws[0].alternatives) == pytest.approx(1.0)


def test_counts_and_times_agree_with_the_stream(harness: Harness) -> None:
    (result,) = harness.generate(request("a"))
    finished = result.finished
    assert (finished.prompt_tokens, finished.generated_tokens) == (4, 20)
    assert finished.queue_s is not None and finished.first_token_s is not None
    assert 0 <= finished.queue_s <= finished.first_token_s <= finished.total_s
