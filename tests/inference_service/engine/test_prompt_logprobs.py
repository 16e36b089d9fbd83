"""The log-probabilities of the tokens of a prompt, which are read in chunks."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_service.engine.request import Delta, Draw, PromptRead
from inference_service.engine.sequence import Sequence
from tests.fakes import tiny_model
from tests.inference_service.engine.harness import Harness, Result, request

CONTEXT = 96


def read(result: Result) -> list[Draw]:
    return [token for event in result.events if isinstance(event, PromptRead) for token in event.tokens]


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, CONTEXT - 1), others=st.integers(0, 2))
def test_they_are_those_of_the_model(length: int, others: int) -> None:
    harness = Harness()
    try:
        harness.add(1, seed=0)
        prompt = "ab cd e" * CONTEXT
        beside = [request(str(number), prompt[number : number + 70]) for number in range(others)]
        (result, *_) = harness.generate(request("asked", prompt[:length], prompt_logprobs=2, max_tokens=1), *beside)
    finally:
        harness.engine.stop()
    tokens = read(result)
    assert [each.token for each in tokens] == list(prompt[:length].encode())
    assert tokens[0] == Draw(tokens[0].token)
    logits = tiny_model(0)(mx.array([[each.token for each in tokens]]))[0]  # (T, V)
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    for position, token in enumerate(tokens[1:]):
        assert token.logprob == pytest.approx(expected[position, token.token], abs=1e-4)
        assert token.rank == 1 + int((expected[position] > expected[position, token.token]).sum())
        assert [each.logprob for each in token.alternatives] == pytest.approx(
            np.sort(expected[position])[::-1][:2].tolist(), abs=1e-4
        )


def test_they_change_no_token_and_come_before_the_first_one(harness: Harness) -> None:
    plain, asked = harness.generate(
        request("plain", "Once upon a time " * 4), request("asked", "Once upon a time " * 4, prompt_logprobs=0)
    )
    assert asked.tokens == plain.tokens
    kinds = [type(event) for event in asked.events]
    assert kinds.index(PromptRead) < kinds.index(Delta)
    assert PromptRead not in [type(event) for event in plain.events]


def test_every_prompt_is_read_for_them_in_spite_of_cached_prefixes() -> None:
    harness = Harness(prefix_bytes=1 << 20)
    try:
        harness.add(1, seed=0)
        prompt = "x" * 90
        for name in ("first", "second"):
            (result,) = harness.generate(request(name, prompt, prompt_logprobs=0))
            assert len(read(result)) == 90
            assert result.finished.cached_prompt_tokens == 0
        # The reading has filled the cache for others.
        (other,) = harness.generate(request("other", prompt))
        assert other.finished.cached_prompt_tokens == 64
    finally:
        harness.engine.stop()


def test_all_samples_share_one_reading(harness: Harness) -> None:
    first, second = harness.samples(request("asked", "Once upon", prompt_logprobs=0, samples=2))
    assert len(read(first)) == 9
    assert read(second) == []


def test_a_prompt_that_is_read_again_is_reported_once() -> None:
    tokens = tuple(Draw(token) for token in range(70))
    sequence = Sequence(request("asked"), 0, CONTEXT, 256, lambda token: b"")
    first, again, rest = (PromptRead(start, tokens[start:end]) for start, end in ((0, 65), (0, 65), (65, 70)))
    assert [sequence.unreported(each) for each in (first, again, rest)] == [[first], [], [rest]]
    longer = PromptRead(0, (*tokens, Draw(70)))
    assert sequence.unreported(longer) == [PromptRead(70, (Draw(70),))]
