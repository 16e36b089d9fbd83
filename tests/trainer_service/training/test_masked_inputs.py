"""The second loss of a step, given inputs of which a part is masked."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from shared.gpt.model import GPT
from tests.trainer_service.training.tiny_runs import MIXTURE, TEXT, teachers, tiny, tolerance, weights
from trainer_service.training import gradients as mlx_gradients
from trainer_service.training.cpu import gradients as cpu_gradients
from trainer_service.training.trainer import Trainer, scalar
from trainer_service.training.workers import Workers

MASKED = tiny(masked_loss=0.4)


def test_of_a_masked_token_the_model_sees_only_the_position() -> None:
    model = GPT(tiny().gpt)
    model.eval()
    tokens = np.array([[5, 6, 7, 8]])
    kept = mx.array([[1, 0, 1, 1]])[..., None]
    other = np.where(np.arange(4) == 1, 9, tokens)
    first, second = (np.array(model.hidden(mx.array(each), kept)) for each in (tokens, other))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, np.array(model.hidden(mx.array(tokens))))
    every = np.array(model.hidden(mx.array(tokens), mx.ones((1, 4, 1))))
    np.testing.assert_array_equal(every, np.array(model.hidden(mx.array(tokens))))


def test_a_step_adds_the_gradients_of_the_masked_loss_and_reports_the_plain_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gradients(share: float, masked: bool) -> tuple[float, dict[str, np.ndarray]]:
        monkeypatch.setattr(mlx_gradients, "_kept_inputs", lambda inputs: mx.full((*inputs.shape, 1), not masked))
        monkeypatch.setattr(cpu_gradients, "_kept_inputs", lambda shape, _: np.full(shape, not masked, np.float32))
        trainer = Trainer(tiny(masked_loss=share, dropout=0.0, tied_head=False), TEXT)
        loss, tree = trainer.gradients.of(trainer._batches.at(0), 0)
        return scalar(loss), {
            name: np.array(mx.array(array, mx.float32)) for name, array in dict(tree_flatten(tree)).items()
        }

    plain_loss, plain = gradients(0.0, masked=False)
    loss, seen = gradients(0.4, masked=False)
    masked_loss, hidden = gradients(0.4, masked=True)
    assert plain_loss == loss == masked_loss
    for name, array in plain.items():
        rtol, atol = tolerance(1e-4, 0.02), tolerance(1e-6, 0.02 * np.abs(array).max())
        np.testing.assert_allclose(seen[name], 1.4 * array, rtol=rtol, atol=atol, err_msg=name)
    # No gradient of the second loss reaches the embedding of a masked token, but the head learns from it.
    embedding = plain["token_embedding.weight"]
    atol = tolerance(0, 0.02 * np.abs(embedding).max())
    np.testing.assert_allclose(hidden["token_embedding.weight"], embedding, rtol=0, atol=atol)
    assert not np.allclose(hidden["head.weight"], plain["head.weight"])


def test_each_row_misses_up_to_half_of_its_inputs() -> None:
    mx.random.seed(1)
    by_mlx = np.array(mlx_gradients._kept_inputs(mx.zeros((200, 400))))[..., 0]
    by_numpy = cpu_gradients._kept_inputs((200, 400), np.random.default_rng(1))
    for kept in (by_mlx.mean(axis=1), by_numpy.mean(axis=1)):
        assert kept.min() > 0.4
        assert 0.7 < kept.mean() < 0.8
        assert np.quantile(kept, 0.1) < 0.6 and np.quantile(kept, 0.9) > 0.9


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_with_masked_inputs_resumes_bit_for_bit(tmp_path: Path, threads: int) -> None:
    with Workers(threads) as workers:
        whole = Trainer(MASKED, MIXTURE, workers, teachers(1))
        for _ in range(3):
            whole.take_step()
        whole.save(tmp_path)
        resumed = Trainer(MASKED, MIXTURE, workers, teachers(1))
        resumed.restore(tmp_path)
        for trainer in (whole, resumed):
            for _ in range(3):
                loss = scalar(trainer.take_step().loss)
        assert np.isfinite(loss)
        for name, array in weights(whole).items():
            np.testing.assert_array_equal(weights(resumed)[name], array)
