"""A pair counts as right if the model gives the right sentence the higher probability."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from shared.errors import InvalidArgument
from shared.gpt.model import GPT
from tests.fakes import byte_tokenizer, tiny_model
from trainer_service.evaluation import minimal_pairs
from trainer_service.evaluation.minimal_pairs import measure_pairs
from trainer_service.evaluation.record import MinimalPairs
from trainer_service.evaluation.statistics import wilson_interval
from trainer_service.training.token_losses import TokenLosses
from trainer_service.training.workers import Workers

WORDS = ["the", "a", "cat", "dog", "cats", "dogs", "sleeps", "sleep", "often", "never", "here", "is", "are"]


def random_pairs(count: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(generator.choice(WORDS, generator.integers(1, 9))) + "."

    return [(f"A {sentence()}", f"B {sentence()}") for _ in range(count)]


def write(path: Path, pairs: list[tuple[str, str]]) -> Path:
    rows = [{"sentence_good": good, "sentence_bad": bad, "UID": "test"} for good, bad in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def log_probability(model: GPT, sentence: str) -> float:
    """By the plain formula, after an end token."""
    tokens = byte_tokenizer().encode(sentence)
    logits = np.array(model(mx.array([[256, *tokens[:-1]]])), np.float64)[0]  # (T, V)
    return float((logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(-1))).sum())


def measure(model: GPT, path: Path, workers: int = 1) -> MinimalPairs:
    with Workers(workers) as threads:
        return measure_pairs(model, byte_tokenizer(), path, threads, lambda _: None)


def test_the_accuracy_is_that_of_the_plain_formula(tmp_path: Path) -> None:
    model, pairs = tiny_model(0), random_pairs(75)
    right = sum(log_probability(model, good) > log_probability(model, bad) for good, bad in pairs)
    assert 10 < right < 65
    measured = measure(model, write(tmp_path / "agreement.jsonl", pairs))
    assert (measured.name, measured.pairs) == ("agreement.jsonl", 75)
    assert measured.accuracy == right / 75
    assert measured.interval == wilson_interval(right, 75)
    # Exchanged sentences are preferred just as often as not.
    exchanged = measure(model, write(tmp_path / "other.jsonl", [(bad, good) for good, bad in pairs]))
    assert exchanged.accuracy == pytest.approx(1 - measured.accuracy)
    assert exchanged.sha256 != measured.sha256


def test_sentences_of_different_lengths_do_not_change_each_other() -> None:
    model, sentences = tiny_model(0), ["a", "The cat sleeps.", "Often the cats never sleep here."]
    nats = minimal_pairs._sentence_nats(TokenLosses(model), list(map(byte_tokenizer().encode, sentences)), 256)
    assert (-nats).tolist() == pytest.approx([log_probability(model, each) for each in sentences], rel=1e-5)


def test_more_workers_measure_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", random_pairs(75))
    assert measure(tiny_model(0), path, workers=2) == measure(tiny_model(0), path)


def test_dropout_is_off_and_the_model_keeps_its_mode(tmp_path: Path) -> None:
    path, model = write(tmp_path / "pairs.jsonl", random_pairs(75)), tiny_model(0)
    expected = measure(model, path)
    model.train()
    assert measure(model, path) == expected
    assert model.training


def test_a_sentence_that_fills_the_context_is_measured_and_a_longer_one_is_named(tmp_path: Path) -> None:
    model = tiny_model(0)
    assert measure(model, write(tmp_path / "long.jsonl", [("x" * 96, "y")])).pairs == 1
    path = write(tmp_path / "too long.jsonl", [("a", "b"), ("a", "b" * 97)])
    with pytest.raises(InvalidArgument) as error:
        measure(model, path)
    assert str(error.value) == (
        "Line 2 of 'too long.jsonl' has a sentence of 97 tokens, but the version sees at most 96 at once."
    )


def test_an_exception_from_the_report_ends_the_work(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", random_pairs(75))
    shares: list[float] = []

    def stop(share: float) -> None:
        shares.append(share)
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_pairs(tiny_model(0), byte_tokenizer(), path, Workers(), stop)
    assert len(shares) == 2
