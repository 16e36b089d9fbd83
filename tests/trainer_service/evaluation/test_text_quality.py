"""The loss on a whole text equals the plain formula, window by window."""

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.errors import DataError, FailedPrecondition
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.fakes import TINY, byte_tokenizer, tiny_model
from trainer_service.evaluation import text_quality
from trainer_service.evaluation.record import TextQuality
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.training.token_losses import TokenLosses
from trainer_service.training.workers import Workers

END = 256


def text(size: int, documents: int = 1, seed: int = 0) -> np.ndarray:
    """Returns random bytes as tokens, cut into documents, each with its end token."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 256, size).astype(np.uint16)
    if documents > 1:
        tokens[np.linspace(0, size - 1, documents + 1).astype(int)[1:]] = END
    return tokens


def measure(
    model: GPT,
    tokens: np.ndarray,
    window: int = 32,
    stride: int = 16,
    report: Callable[[float], object] = lambda _: None,
    workers: int = 1,
) -> TextQuality:
    with Workers(workers) as threads:
        return measure_text(
            model, tokens, byte_tokenizer(), window=window, stride=stride, workers=threads, report=report
        )


def row_losses(model: GPT, row: np.ndarray) -> np.ndarray:
    """Returns the losses (T,) of a row of T+1 tokens, by the plain formula."""
    logits = np.array(model(mx.array(row[None, :-1].astype(np.int32))), np.float64)[0]  # (T, V)
    result: np.ndarray = np.log(np.exp(logits).sum(-1)) - logits[np.arange(row.size - 1), row[1:]]
    return result


def plain_losses(model: GPT, tokens: np.ndarray, window: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the loss of each token, (N,), and the sums and counts of all losses by position, (2, T)."""
    row = np.concatenate([[END], tokens])
    losses = np.full(tokens.size, np.nan)
    by_position = np.zeros((2, window))
    start = 0
    while True:
        start = min(start, max(tokens.size - window, 0))
        measured = row_losses(model, row[start : start + window + 1])
        by_position[:, : measured.size] += measured, np.ones(measured.size)
        for target, nats in enumerate(measured, start):
            if np.isnan(losses[target]):
                losses[target] = nats
        if start + window >= tokens.size:
            return losses, by_position
        start += stride


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 48, 49, 64, 200])
@pytest.mark.parametrize("stride", [1, 7, 16, 32])
def test_each_token_counts_once_in_the_first_window_that_predicts_it(size: int, stride: int) -> None:
    model, tokens = tiny_model(0), text(size)
    losses, by_position = plain_losses(model, tokens, 32, stride)
    quality = measure(model, tokens, 32, stride)
    assert sum(quality.unit_tokens) == size
    assert sum(quality.unit_nats) == pytest.approx(losses.sum(), rel=1e-5)
    assert quality.nats_per_token == pytest.approx(losses.mean(), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert quality.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / size, rel=1e-5)
    (positions,) = quality.positions
    assert (positions.first, positions.last, positions.tokens) == (0, min(size, 32) - 1, by_position[1].sum())
    assert positions.nats_per_token == pytest.approx(by_position[0].sum() / by_position[1].sum(), rel=1e-5)
    # Each passage of `stride` tokens.
    passages = np.add.reduceat(losses, np.arange(0, size, stride))
    assert quality.unit == "passage"
    np.testing.assert_allclose(quality.unit_nats, passages, rtol=2e-5)


def test_losses_by_position_are_those_of_all_windows() -> None:
    model = tiny_model(0, GPTConfig(1, 16, 2, 32, 600, 257, tied_head=False))
    tokens = text(2000)
    quality = measure(model, tokens, 600, 300)
    _, (sums, counts) = plain_losses(model, tokens, 600, 300)
    assert [(each.first, each.last) for each in quality.positions] == [(0, 31), (32, 127), (128, 511), (512, 599)]
    for each in quality.positions:
        inside = slice(each.first, each.last + 1)
        assert each.tokens == counts[inside].sum()
        assert each.nats_per_token == pytest.approx(sums[inside].sum() / counts[inside].sum(), rel=1e-5)


@given(size=st.integers(1, 300), window=st.integers(1, 60), data=st.data())
def test_the_number_of_windows_is_that_of_the_method(size: int, window: int, data: st.DataObject) -> None:
    """As `Method.windows` computes it. Adjacent windows leave no token out, and the last one ends with the text."""
    stride = data.draw(st.integers(1, window))
    starts = text_quality._window_starts(size, window, stride)
    assert starts.size == 1 + -(-max(size - window, 0) // stride)
    assert starts[0] == 0 and starts[-1] == max(size - window, 0)
    assert all(0 < step <= stride for step in np.diff(starts))


@pytest.mark.parametrize("last_ends", [True, False])
def test_from_30_documents_on_the_units_are_documents(last_ends: bool) -> None:
    model, tokens = tiny_model(0), text(700, documents=30)
    if not last_ends:
        tokens[-1] = 65
    quality = measure(model, tokens)
    losses, _ = plain_losses(model, tokens, 32, 16)
    first = np.concatenate([[0], np.flatnonzero(tokens[:-1] == END) + 1])
    assert quality.unit == "document"
    assert quality.unit_tokens == tuple(np.diff([*first, 700]))
    np.testing.assert_allclose(quality.unit_nats, np.add.reduceat(losses, first), rtol=2e-5)
    interval = quality.interval
    assert interval is not None and interval.low < quality.nats_per_token < interval.high


def test_below_30_documents_the_units_are_passages() -> None:
    quality = measure(tiny_model(0), text(700, documents=29))
    assert quality.unit == "passage"
    assert quality.unit_tokens == (16,) * 43 + (12,)


def test_end_tokens_have_no_bytes() -> None:
    quality = measure(tiny_model(0), text(700, documents=29))
    assert quality.bits_per_byte == pytest.approx(quality.nats_per_token * 700 / math.log(2) / (700 - 29))
    nothing = measure(tiny_model(0), np.full(3, END, np.uint16))
    assert nothing.bits_per_byte == pytest.approx(sum(nothing.unit_nats) / math.log(2))


def test_a_text_of_one_unit_has_no_interval() -> None:
    quality = measure(tiny_model(0), text(5))
    assert quality.interval is None
    assert quality.unit_tokens == (5,)


def test_an_empty_text_is_a_sentence() -> None:
    with pytest.raises(DataError, match=r"is empty; it must have at least one token\.$"):
        measure(tiny_model(0), text(0))


def test_bits_depend_neither_on_the_number_of_workers_nor_on_the_call() -> None:
    model, tokens = tiny_model(0), text(9001, documents=40)
    alone = measure(model, tokens, 96, 48)
    assert measure(model, tokens, 96, 48) == alone
    assert measure(model, tokens, 96, 48, workers=2) == alone
    assert measure(model, tokens, 96, 48, workers=5) == alone


def test_the_batches_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, the bits of larger models depend on the size of a batch."""
    shapes: list[tuple[int, ...]] = []

    class Observed(TokenLosses):
        def __call__(self, inputs: NDArray[np.int32], targets: NDArray[np.int32]) -> NDArray[np.float32]:
            shapes.append(inputs.shape)
            return super().__call__(inputs, targets)

    monkeypatch.setattr(text_quality, "TokenLosses", Observed)
    measure(tiny_model(0), text(9001), 96, 48)
    alone = sorted(shapes)
    shapes.clear()
    measure(tiny_model(0), text(9001), 96, 48, workers=3)
    assert sorted(shapes) == alone


def test_dropout_is_off_and_the_model_keeps_its_mode() -> None:
    assert TINY.dropout > 0
    model, tokens = tiny_model(0), text(100)
    expected = measure(model, tokens)
    model.train()
    assert measure(model, tokens) == expected
    assert model.training


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_is_reported_and_an_exception_from_it_ends_the_work(workers: int) -> None:
    class Stopped(Exception):
        pass

    shares: list[float] = []
    measure(tiny_model(0), text(9000), 96, 48, shares.append, workers)
    assert min(shares) == 0 and max(shares) < 1
    assert len(shares) > 10

    def stop(share: float) -> None:
        if share > 0.3:
            raise Stopped

    model = tiny_model(0)
    model.train()
    with pytest.raises(Stopped):
        measure(model, text(9000), 96, 48, stop, workers)
    assert model.training


@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_loss_that_is_not_finite_is_a_sentence(value: float) -> None:
    model = tiny_model(0)
    model.head.weight = model.head.weight * value
    with pytest.raises(FailedPrecondition, match=r"^The loss of the version is .* nats per token, but must be at most"):
        measure(model, text(50))
