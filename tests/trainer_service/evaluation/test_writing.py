"""Criteria: a continuation has the tokens that the engine draws, and the same bits in any number of slots and threads;
the figures of texts that can be counted by hand."""

import string
from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import trainer_service.evaluation.writing as writing
from shared.decoding.decoder import DecoderFactory
from shared.decoding.sampling import SamplingParameters, TemperatureSampling, sample
from shared.decoding.spans import Span
from shared.errors import FailedPrecondition
from shared.gpt.model import GPT
from tests.decoders import COMPILED
from tests.fakes import TINY, byte_tokenizer, tiny_model
from tests.inference_service.engine.harness import Harness, request
from trainer_service.evaluation.method import HeldOutText, Method
from trainer_service.evaluation.record import Writing
from trainer_service.evaluation.writing import measure_writing
from trainer_service.training.batches import Tokens

END = 256
METHOD = Method(
    text=HeldOutText("text", "", 0, 0, 0, ""),
    tokenizer="",
    window=96,
    stride=48,
    precision="float32",
    device="cpu",
    prompts=3,
    prompt_tokens=4,
    seeds=(1, 2),
    max_tokens=20,
    temperature=0.8,
)


def tokens_of(*documents: str, last_ends: bool = True) -> Tokens:
    tokens = [token for document in documents for token in (*document.encode(), END)]
    return np.array(tokens if last_ends else tokens[:-1], np.uint16)


HELD_OUT = tokens_of("Once upon a time", "no", "There was a cat", "and", "A boy ran home.", "The end of it")


def measured(
    held_out: Tokens = HELD_OUT,
    training: Tokens | None = None,
    model: GPT | None = None,
    threads: int = 1,
    **values: object,
) -> Writing:
    method = replace(METHOD, **values)  # type: ignore[arg-type]
    model = model or tiny_model(1)
    return measure_writing(
        model, byte_tokenizer(), held_out, training, method, threads=threads, cache=COMPILED, report=lambda share: None
    )


class Alphabet:
    """A decoder after which each letter follows the one before it, and the end after z."""

    def forward(self, spans: Sequence[Span]) -> Sequence[np.ndarray]:
        logits = np.full((len(spans), 257), -1000.0, np.float32)
        for row, span in zip(logits, spans, strict=True):
            last = span.tokens[-1]
            row[END if last == ord("z") else last + 1] = 0.0
        return list(logits)

    def draw(self, rows: Sequence[TemperatureSampling]) -> list[int | None]:
        return [sample(row.logits, SamplingParameters(row.temperature), row.seed, row.position) for row in rows]


@pytest.fixture
def alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecoderFactory, "make", lambda factory, model: Alphabet())


def prompts(result: Writing) -> list[str]:
    return [each.prompt for each in result.continuations[: len(result.continuations) // 2]]


def test_the_engine_writes_the_same_text() -> None:
    result = measured()
    engine = Harness()
    engine.add(1, seed=1)
    sampling = SamplingParameters(temperature=0.8)
    requests = [
        request(str(index), each.prompt, seed=each.seed, sampling=sampling, ignore_eos=False)
        for index, each in enumerate(result.continuations)
    ]
    answers = engine.generate(*requests)
    engine.engine.stop()
    assert [each.text for each in result.continuations] == [answer.text for answer in answers]
    assert [each.seed for each in result.continuations] == [1, 1, 1, 2, 2, 2]
    assert len({each.text for each in result.continuations}) == 6


def test_the_number_of_slots_and_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    once = measured(training=HELD_OUT)
    monkeypatch.setattr(writing, "_SLOTS", 4)
    assert measured(training=HELD_OUT, threads=2) == once
    monkeypatch.setattr(writing, "_SLOTS", 2)
    assert measured(training=HELD_OUT) == once


def test_a_long_prompt_is_read_as_the_engine_reads_it() -> None:
    model = tiny_model(2, replace(TINY, context_length=256))
    prompt = string.printable[:90]
    (result, _) = measured(tokens_of(f"{prompt}, and so on"), model=model, prompt_tokens=90).continuations
    engine = Harness()
    engine.add_model(1, model)
    sampling = SamplingParameters(temperature=0.8)
    (answer,) = engine.generate(request("long", prompt, seed=1, sampling=sampling, ignore_eos=False))
    engine.engine.stop()
    assert result.prompt == prompt
    assert result.text == answer.text


@pytest.mark.usefixtures("alphabet")
def test_prompts_are_spread_over_the_documents_that_are_longer() -> None:
    documents = [f"{letter}{number:03}{'x' * (number % 3)}" for number, letter in enumerate(string.ascii_lowercase)]
    # Those of 4 letters are no longer than the prompt.
    longer = [document[:4] for document in documents if len(document) > 4]
    found = prompts(measured(tokens_of(*documents)))
    assert found == [longer[0], longer[len(longer) // 3], longer[len(longer) * 2 // 3]]
    assert prompts(measured(tokens_of(*documents), prompts=100)) == longer


@pytest.mark.usefixtures("alphabet")
def test_few_documents_are_also_continued_within() -> None:
    document = string.ascii_lowercase * 4
    places = prompts(measured(tokens_of(document, last_ends=False), prompts=4, max_tokens=20))
    assert places == [document[at : at + 4] for at in (0, 26, 52, 78)]
    # What follows there must be part of the document.
    assert prompts(measured(tokens_of(document, last_ends=False), prompts=4, max_tokens=30)) == [document[:4]] * 3


@pytest.mark.usefixtures("alphabet")
def test_a_text_of_short_documents_or_of_few_tokens_is_continued_from_its_beginning() -> None:
    assert prompts(measured(tokens_of("ab", "cd", "ef"))) == ["abc"]
    assert prompts(measured(tokens_of("a", last_ends=False))) == ["a"]
    nobody = measured(tokens_of("a", last_ends=False), training=HELD_OUT).human
    assert (nobody.texts, nobody.tokens, nobody.distinct, nobody.repeated) == (1, 0, (0.0, 0.0, 0.0), 0.0)
    assert (nobody.copied_median, nobody.copied_longest) == (0.0, 0)


@pytest.mark.usefixtures("alphabet")
def test_a_text_ends_with_the_end_token_or_at_the_limit() -> None:
    held_out = tokens_of("abcdefgh", "vwxyxyxyz", "qrstt", last_ends=False)
    result = measured(held_out, max_tokens=5, seeds=(7,))
    assert [(each.text, each.tokens, each.ended) for each in result.continuations] == [
        ("efghi", 5, False),
        ("z", 1, True),
        ("uvwxy", 5, False),
    ]
    assert (result.model.texts, result.model.tokens, result.model.ended) == (3, 11, 1 / 3)
    # "efgh" ends, "xyxyz" reaches the limit, and the end of the text is not that of a document.
    assert (result.human.texts, result.human.tokens, result.human.ended) == (3, 10, 1 / 3)


def test_a_prompt_takes_half_of_a_short_context_and_the_text_ends_with_it() -> None:
    short = measured(model=tiny_model(1, replace(TINY, context_length=6)))
    assert prompts(short) == ["Onc", "The", "A b"]
    assert {each.tokens for each in short.continuations} == {3}
    shortest = measured(model=tiny_model(1, replace(TINY, context_length=1)))
    assert prompts(shortest) == ["O", "T", "A"]
    assert {each.tokens for each in shortest.continuations} == {1}


@pytest.mark.usefixtures("alphabet")
def test_figures_count_tokens_and_runs() -> None:
    held_out = tokens_of("abcdxyxyxyxy", "ghijklm")
    training = tokens_of("efgh", "xyx", "klm", "a")
    result = measured(held_out, training, max_tokens=8, seeds=(1, 2))
    # The model writes "efghijkl" and "klmnopqr" twice, people "xyxyxyxy" and "klm".
    assert result.model.distinct == (14 / 16, 13 / 14, 12 / 12)
    assert result.model.repeated == 0.0
    assert [each.copied for each in result.continuations] == [4, 3, 4, 3]
    assert (result.model.copied_median, result.model.copied_longest) == (3.5, 4)
    assert result.human.distinct == (5 / 11, 4 / 9, 3 / 7)
    assert result.human.repeated == 3 / 5
    assert (result.human.copied_median, result.human.copied_longest) == (3.0, 3)
    assert result.training_tokens == training.size


@pytest.mark.usefixtures("alphabet")
def test_without_training_text_copies_are_unknown() -> None:
    result = measured()
    assert result.training_tokens == 0
    assert (result.model.copied_median, result.human.copied_longest, result.continuations[0].copied) == (None,) * 3


def test_numbers_that_are_not_finite_are_an_error() -> None:
    model = tiny_model(1)
    model.final_norm.weight = mx.full(model.final_norm.weight.shape, float("nan"))
    with pytest.raises(FailedPrecondition, match=r"^The model computes numbers that are not finite after 'Once'\.$"):
        measured(model=model)


@pytest.mark.usefixtures("alphabet")
@pytest.mark.parametrize("training", [None, HELD_OUT])
def test_the_share_that_is_done_rises_to_one_and_its_receiver_ends_the_work(
    training: Tokens | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_SLOTS", 2)
    arguments = (tiny_model(1), byte_tokenizer(), tokens_of("abcdefgh"), training, METHOD)
    shares: list[float] = []
    measure_writing(*arguments, threads=1, cache=COMPILED, report=shares.append)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) >= 20

    def stop(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_writing(*arguments, threads=1, cache=COMPILED, report=stop)
