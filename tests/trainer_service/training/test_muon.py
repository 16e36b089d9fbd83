from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from shared.errors import InvalidArgument
from tests.ring_processes import in_ranks
from tests.trainer_service.training.tiny_runs import TEXT, tiny, tolerance, weights
from trainer_service.training import muon
from trainer_service.training.config import TrainingConfig
from trainer_service.training.optimizer import Optimizer
from trainer_service.training.ranks import Ranks
from trainer_service.training.trainer import Trainer, scalar
from trainer_service.training.workers import Workers

QKV, UP, DOWN, NORM = (
    f"blocks.0.{name}.weight" for name in ("attention.qkv", "feed_forward.up", "feed_forward.down", "attention_norm")
)
Matrix = NDArray[np.float64]


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def orthogonalised(matrix: Matrix) -> Matrix:
    """The iterations for one matrix of any shape, in NumPy."""
    x: Matrix = matrix / np.linalg.norm(matrix)
    for a, b, c in muon.POLYNOMIALS:
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def direction(matrix: Matrix) -> Matrix:
    scale: float = 0.6 * max(matrix.shape) ** 0.5
    return scale * orthogonalised(matrix)


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 96, 32), (2, 40, 1)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_singular_values_become_nearly_1_and_singular_vectors_stay(shape: tuple[int, ...], size: float) -> None:
    u, _, v = np.linalg.svd(np.array(random(*shape)), full_matrices=False)
    # Singular values near 0 would take more steps.
    before = size * (u * np.linspace(0.05, 1, shape[2]) @ v)
    after = np.array(muon.orthogonalised(mx.array(before.astype(np.float32))))
    values = np.linalg.svd(after, compute_uv=False)
    assert values.min() > 0.6 and values.max() < 1.3
    inner = u.swapaxes(1, 2) @ after @ v.swapaxes(1, 2)
    np.testing.assert_allclose(inner, inner * np.eye(shape[2]), atol=tolerance(2e-3, 0.05))


def test_the_polynomials_move_all_singular_values_of_their_range_close_to_1() -> None:
    values = np.geomspace(3e-3, 1.0, 10_000)
    for a, b, c in muon.POLYNOMIALS:
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.76 and values.max() < 1.2


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not mx.any(muon.orthogonalised(mx.zeros((2, 8, 4))))


def test_directions_are_those_of_each_matrix_alone() -> None:
    """Of a tall matrix, a wide one, a square one and three that lie side by side."""
    momenta = {
        QKV: random(48, 16),
        UP: random(32, 16),
        DOWN: random(16, 32),
        "blocks.0.attention.output.weight": random(16, 16),
    }
    expected = {name: direction(np.array(array)) for name, array in momenta.items()}
    expected[QKV] = np.concatenate([direction(part) for part in np.split(np.array(momenta[QKV]), 3)])
    found = muon.directions(momenta)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], atol=tolerance(3e-4, 0.2))
    rms = [float(mx.sqrt(mx.square(array).mean())) for array in found.values()]
    assert rms == pytest.approx([0.6] * 4, rel=0.25)


def test_muon_updates_the_matrices_of_the_blocks_alone() -> None:
    names = [name for name in weights(Trainer(tiny(tied_head=False), TEXT)) if muon.is_matrix(name)]
    assert sorted(name.removeprefix("blocks.0.").removesuffix(".weight") for name in names) == [
        "attention.output",
        "attention.qkv",
        "feed_forward.down",
        "feed_forward.up",
    ]


def test_momentum_decay_and_clipping_are_those_of_the_formula() -> None:
    config = tiny(optimizer="muon", weight_decay=0.5, max_gradient_norm=0.7)
    parameters = {"blocks": [{"feed_forward": {"up": {"weight": random(6, 4, seed=9)}}}]}
    optimizer = Optimizer(config, parameters)
    expected, momentum = np.array(random(6, 4, seed=9)), np.zeros((6, 4))
    for step in range(4):
        gradient = np.array(random(6, 4, seed=step))
        changes = {"blocks": [{"feed_forward": {"up": {"weight": mx.array(gradient)}}}]}
        parameters, norm = optimizer.update(parameters, changes, mx.array(0.01))
        assert norm.item() == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
        clipped = gradient * 0.7 / np.linalg.norm(gradient)
        momentum = 0.95 * momentum + 0.05 * clipped
        ahead = 0.95 * momentum + 0.05 * clipped
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * direction(ahead)
        (updated,) = dict(tree_flatten(parameters)).values()
        np.testing.assert_allclose(updated, expected, atol=tolerance(1e-5, 5e-3))
    assert list(dict(tree_flatten(optimizer.state))) == ["step", f"m.{UP}"]


def test_what_muon_leaves_to_adamw_gets_exactly_what_adamw_alone_gives() -> None:
    parameters = Trainer(tiny(), TEXT).model.trainable_parameters()
    gradients = dict(tree_flatten(parameters))
    results = []
    for name in ("adamw", "muon"):
        optimizer = Optimizer(tiny(optimizer=name), parameters)
        new = parameters
        for _ in range(3):
            new, _ = optimizer.update(new, parameters, mx.array(0.01))
        results.append((dict(tree_flatten(new)), dict(tree_flatten(optimizer.state))))
    (new, state), (muon_new, muon_state) = results
    for name in gradients:
        assert mx.array_equal(new[name], muon_new[name]) == (not muon.is_matrix(name)), name
        assert (f"v.{name}" in muon_state) == (not muon.is_matrix(name))
    for name, array in muon_state.items():
        assert muon.is_matrix(name[2:]) or mx.array_equal(array, state[name])


def moments(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in dict(tree_flatten(trainer.optimizer.state)).items()}


def trained(config: TrainingConfig, steps: int, workers: Workers, folder: Path | None = None) -> Trainer:
    trainer = Trainer(config, TEXT, workers)
    if folder:
        trainer.restore(folder)
    for _ in range(steps):
        trainer.take_step()
    return trainer


@pytest.mark.parametrize("threads", [1, 2])
def test_a_restored_run_ends_with_the_same_bits(threads: int, tmp_path: Path) -> None:
    config = tiny(optimizer="muon", layers=2, batch_size=5)
    with Workers(threads) as workers:
        whole = trained(config, 7, workers)
        trained(config, 4, workers).save(tmp_path)
        resumed = trained(config, 3, workers, tmp_path)
    for of in (weights, moments):
        expected = of(whole)
        for name, array in of(resumed).items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_several_workers_take_the_same_step_as_one() -> None:
    config = tiny(optimizer="muon", layers=2, batch_size=5, dropout=0.0)
    alone = weights(trained(config, 3, Workers()))
    with Workers(2) as workers:
        together = weights(trained(config, 3, workers))
    for name, array in alone.items():
        np.testing.assert_allclose(together[name], array, atol=1e-4)


def test_muon_learns_a_regular_text() -> None:
    trainer = Trainer(tiny(optimizer="muon", max_steps=100, learning_rate=2e-2, dropout=0.0), TEXT)
    first = scalar(trainer.take_step().loss)
    for _ in range(99):
        last = scalar(trainer.take_step().loss)
    assert 5.0 < first < 6.5 and last < 0.5 * first


@pytest.mark.parametrize(("saved", "wanted"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_state_of_another_optimizer_is_rejected(saved: str, wanted: str, tmp_path: Path) -> None:
    Trainer(tiny(optimizer=saved), TEXT).save(tmp_path)
    with pytest.raises(InvalidArgument, match=f"The saved optimizer is {saved}, but the run has {wanted}"):
        Trainer(tiny(optimizer=wanted), TEXT).restore(tmp_path)


def steps_of_a_rank(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    ranks = Ranks.join()
    with Workers(2) as workers:
        trainer = Trainer(tiny(optimizer="muon", dropout=0.0, world_size=2), TEXT, workers, ranks=ranks)
        if ranks.rank == 0:
            trainer.restore(folder)
        trainer.take_first_state()
        for _ in range(3):
            trainer.take_step()
        return weights(trainer), moments(trainer)


@pytest.mark.slow
def test_ranks_agree_and_train_as_one_process(tmp_path: Path) -> None:
    config = tiny(optimizer="muon", dropout=0.0)
    folder = tmp_path / "state"
    folder.mkdir()
    trained(config, 2, Workers()).save(folder)
    first, second = in_ranks(2, steps_of_a_rank, tmp_path, folder)
    alone = trained(config, 3, Workers(), folder)
    for one, other, expected in zip(first, second, (weights(alone), moments(alone)), strict=True):
        assert one.keys() == expected.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)
            np.testing.assert_allclose(array, expected[name], atol=tolerance(1e-4, 1e-2), err_msg=name)
