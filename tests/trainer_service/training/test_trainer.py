from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CorruptCheckpoint, InvalidArgument
from shared.gpt.model import parameters_of
from tests.trainer_service.training.tiny_runs import END, MIXTURE, TEXT, TOKENS, teachers, tiny, weights
from trainer_service.training.batches import TeacherText, TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.loss import token_losses
from trainer_service.training.optimizer import Optimizer
from trainer_service.training.trainer import Trainer, scalar
from trainer_service.training.workers import Workers


def test_a_restored_run_ends_with_the_same_bits_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = Trainer(tiny(), TEXT)
    for _ in range(8):
        whole.take_step()
    first = Trainer(tiny(), TEXT)
    for _ in range(5):
        first.take_step()
    first.record_evaluation(3.25)
    first.save(tmp_path)
    second = Trainer(tiny(), TEXT)
    second.restore(tmp_path)
    assert (second.step, second.tokens, second.best_validation_loss) == (5, 5 * 4 * 8, 3.25)
    for _ in range(3):
        second.take_step()
    expected = weights(whole)
    for name, value in weights(second).items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_continued_run_with_a_new_schedule_resumes_with_the_same_bits(tmp_path: Path) -> None:
    begun = Trainer(tiny(), TEXT)
    for _ in range(20):
        begun.take_step()
    begun.save(tmp_path)
    config = tiny(max_steps=30).continuing(tiny(), 20)

    def restored(directory: Path, steps: int) -> Trainer:
        trainer = Trainer(config, TEXT)
        trainer.restore(directory)
        for _ in range(steps):
            trainer.take_step()
        return trainer

    whole = restored(tmp_path, 6)
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    restored(tmp_path, 2).save(interrupted)
    expected = weights(whole)
    for name, value in weights(restored(interrupted, 4)).items():
        np.testing.assert_array_equal(value, expected[name])


def test_training_learns_a_regular_text() -> None:
    trainer = Trainer(tiny(max_steps=200, learning_rate=2e-2, dropout=0.0), TEXT)
    first = scalar(trainer.take_step().loss)
    for _ in range(199):
        last = scalar(trainer.take_step().loss)
    assert 5.0 < first < 6.5 and last < 0.5 * first


def test_another_seed_trains_another_model() -> None:
    one, other = Trainer(tiny(), TEXT), Trainer(tiny(seed=1), TEXT)
    assert one.take_step().loss.item() != other.take_step().loss.item()


def test_dropout_differs_from_step_to_step() -> None:
    trainer = Trainer(tiny(dropout=0.5, learning_rate=1e-8, seed=3), TrainingText(np.full(9, 5, np.uint16), END))
    losses = {scalar(trainer.take_step().loss) for _ in range(4)}
    assert len(losses) == 4


def test_a_state_of_another_shape_is_rejected(tmp_path: Path) -> None:
    Trainer(tiny(), TEXT).save(tmp_path)
    with pytest.raises(InvalidArgument, match="shape"):
        Trainer(tiny(width=32), TEXT).restore(tmp_path)


def test_matrices_decay_and_biases_do_not() -> None:
    # The decay is so large that it outweighs the gradients.
    config = tiny(weight_decay=50.0, learning_rate=1e-3, warmup_steps=0, dropout=0.0)
    trainer = Trainer(config, TEXT)
    trainer.model.load_weights([("final_norm.weight", mx.full((16,), 3.0))], strict=False)
    before = weights(trainer)
    trainer.take_step()
    after = weights(trainer)
    ratio = np.abs(after["position_embedding.weight"]).sum() / np.abs(before["position_embedding.weight"]).sum()
    assert ratio == pytest.approx(0.95, abs=0.03)
    assert np.abs(after["final_norm.weight"] - 3.0).max() <= 1.1e-3


SCHEDULES = [
    tiny(),
    tiny(warmup_steps=0),
    tiny(schedule="wsd", decay_ratio=0.4),
    tiny(max_steps=35).continuing(tiny(), 20),
    tiny(max_steps=35).continuing(tiny(), 20, {"learning_rate"}),
    tiny(schedule="wsd", max_steps=30).continuing(tiny(schedule="wsd"), 10),
]


@pytest.mark.parametrize("config", SCHEDULES)
def test_a_compiled_step_uses_the_rate_of_the_schedule(config: TrainingConfig, tmp_path: Path) -> None:
    # With betas of 0, AdamW moves every number by the rate, up or down; vectors do not decay.
    config = replace(config, beta1=0.0, beta2=0.0)
    trainer = Trainer(config, TEXT)
    trainer.step = config.schedule_start
    trainer.optimizer.state["step"] = mx.array(config.schedule_start)
    trainer.save(tmp_path)
    trainer.restore(tmp_path)
    before = weights(trainer)["final_norm.bias"]
    for step in range(config.schedule_start, config.max_steps):
        trainer.take_step()
        after = weights(trainer)["final_norm.bias"]
        expected = config.learning_rate_at(step)
        assert np.abs(after - before).max() == pytest.approx(expected, rel=1e-3)
        assert trainer.learning_rate == pytest.approx(expected, rel=1e-5)
        before = after


def test_several_workers_take_the_same_step_as_one() -> None:
    # Two workers share 5 rows: 2 and 3.
    config = tiny(batch_size=5, dropout=0.0)
    alone = Trainer(config, TEXT)
    with Workers(2) as workers:
        together, again = Trainer(config, TEXT, workers), Trainer(config, TEXT, workers)
        for _ in range(3):
            losses = [scalar(trainer.take_step().loss) for trainer in (alone, together, again)]
            assert losses[1] == losses[2] == pytest.approx(losses[0], abs=1e-5)
    for name, value in weights(alone).items():
        np.testing.assert_allclose(weights(together)[name], value, atol=2e-5)
        np.testing.assert_array_equal(weights(together)[name], weights(again)[name])


def test_micro_batches_take_the_same_step_as_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(batch_size=7, dropout=0.0)
    whole = Trainer(config, TEXT)
    whole.take_step()
    monkeypatch.setattr("trainer_service.training.config.MICRO_BATCH_TOKENS", 3 * config.context_length)
    divided = Trainer(config, TEXT)
    divided.take_step()
    for name, value in weights(whole).items():
        np.testing.assert_allclose(weights(divided)[name], value, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("text", [TEXT, MIXTURE], ids=["text", "mixture"])
def test_a_restored_run_with_teachers_ends_with_the_same_bits(threads: int, text: TrainingText, tmp_path: Path) -> None:
    config = tiny(batch_size=5, distillation_temperature=1.5)
    with Workers(threads) as workers:
        whole, first, second = (Trainer(config, text, workers, teachers(2)) for _ in range(3))
        for _ in range(7):
            whole.take_step()
        for _ in range(4):
            first.take_step()
        first.save(tmp_path)
        second.restore(tmp_path)
        for _ in range(3):
            second.take_step()
    expected = weights(whole)
    for name, value in weights(second).items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("text", [TEXT, MIXTURE], ids=["text", "mixture"])
def test_workers_and_micro_batches_learn_from_teachers_as_one_batch_does(
    text: TrainingText, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(batch_size=7, dropout=0.0)
    alone = Trainer(config, text, teachers=teachers(2))
    monkeypatch.setattr("trainer_service.training.config.MICRO_BATCH_TOKENS", 2 * config.context_length)
    with Workers(2) as workers:
        together = Trainer(config, text, workers, teachers(2))
        for _ in range(3):
            losses = [scalar(trainer.take_step().loss) for trainer in (alone, together)]
            assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    for name, value in weights(alone).items():
        np.testing.assert_allclose(weights(together)[name], value, atol=2e-5)


def test_teachers_change_the_weights_and_not_the_reported_loss_of_the_same_weights() -> None:
    plain, taught = Trainer(tiny(), TEXT), Trainer(tiny(), TEXT, teachers=teachers(1))
    first = [scalar(trainer.take_step().loss) for trainer in (plain, taught)]
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    assert not np.allclose(weights(plain)["final_norm.bias"], weights(taught)["final_norm.bias"], atol=1e-6)


def test_an_alpha_of_0_is_plain_training() -> None:
    config = tiny(distillation_alpha=0.0)
    plain, taught = Trainer(config, TEXT), Trainer(config, TEXT, teachers=teachers(2))
    for _ in range(3):
        assert scalar(plain.take_step().loss) == scalar(taught.take_step().loss)
    for name, value in weights(plain).items():
        np.testing.assert_array_equal(weights(taught)[name], value)


def test_a_model_that_trains_on_can_teach_what_it_was() -> None:
    first = Trainer(tiny(), TEXT)
    second = Trainer(tiny(), TEXT, teachers=[first.model])
    first.take_step()
    third = Trainer(tiny(), TEXT, teachers=[Trainer(tiny(), TEXT).model])
    for trainer in (second, third):
        trainer.take_step()
    for name, array in weights(second).items():
        np.testing.assert_array_equal(array, weights(third)[name])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_state_whose_arrays_are_not_those_of_its_model_is_refused(file: str, tmp_path: Path) -> None:
    Trainer(tiny(), TEXT).save(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    Trainer(tiny(width=32), TEXT).save(other)
    (other / file).replace(tmp_path / file)
    with pytest.raises(CorruptCheckpoint, match=f"{file} has not the arrays of the model in "):
        Trainer(tiny(), TEXT).restore(tmp_path)


def test_teachers_have_no_dropout_and_stay_as_they_are() -> None:
    after = []
    for dropout in (0.0, 0.5):
        (teacher,) = teachers(1, dropout)
        before = {name: np.array(value) for name, value in parameters_of(teacher).items()}
        trainer = Trainer(tiny(), TEXT, teachers=[teacher])
        for _ in range(3):
            trainer.take_step()
        after.append(weights(trainer))
        assert teacher.training
        for name, array in parameters_of(teacher).items():
            np.testing.assert_array_equal(array, before[name])
    for name, value in after[0].items():
        np.testing.assert_array_equal(after[1][name], value)


def test_a_student_learns_from_its_teacher_alone() -> None:
    """Its own text says nothing: each target is the same token."""
    teacher = Trainer(tiny(max_steps=200, learning_rate=2e-2, dropout=0.0), TEXT)
    for _ in range(200):
        teacher.take_step()
    text = TrainingText(TOKENS, END, TeacherText(TOKENS[::-1].copy()))
    config = tiny(max_steps=200, learning_rate=2e-2, dropout=0.0, distillation_alpha=1.0, teacher_share=1.0)
    student = Trainer(config, text, teachers=[teacher.model])
    for _ in range(200):
        student.take_step()
    rows = mx.array(TOKENS[:64].reshape(8, 8).astype(np.int32))
    following = mx.array(TOKENS[1:65].reshape(8, 8).astype(np.int32))
    student.model.eval()
    assert scalar(token_losses(student.model, rows, following).mean()) < 3.0


def test_workers_draw_different_dropout() -> None:
    # All rows hold the same tokens, so that only dropout can make their losses differ.
    config = tiny(dropout=0.5, batch_size=2)
    text = TrainingText(np.full(9, 5, np.uint16), END)
    with Workers(2) as workers:
        both = Trainer(config, text, workers).take_step().loss
    one = Trainer(replace(config, batch_size=1), text).take_step().loss
    assert scalar(both) != scalar(one)


def test_a_max_gradient_norm_of_0_clips_nothing() -> None:
    gradients = {"matrix": mx.full((5, 3), 100.0)}
    outcomes = []
    for largest in (0.0, 1e9, 1.0):
        optimizer = Optimizer(tiny(max_gradient_norm=largest), gradients)
        optimizer.update(gradients, gradients, mx.array(0.1))
        outcomes.append(optimizer.state["m"]["matrix"][0, 0].item())
    unclipped, far_below, clipped = outcomes
    assert unclipped == far_below == pytest.approx(10.0) and clipped < 0.1


# The ends of each range, and a value between them.
@settings(deadline=None, max_examples=60)
@given(
    rate=st.sampled_from([1e-8, 1e-6, 1.0]),
    beta1=st.sampled_from([0.0, 0.9, 0.9999]),
    beta2=st.sampled_from([0.0, 0.95, 0.9999]),
    largest=st.sampled_from([0.0, 1e-3, 1e9]),
    decay=st.sampled_from([0.0, 0.1, 0.999]),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_the_optimizer_moves_the_weights_with_all_allowed_values(
    rate: float, beta1: float, beta2: float, largest: float, decay: float, size: float
) -> None:
    config = tiny(learning_rate=rate, beta1=beta1, beta2=beta2, max_gradient_norm=largest, weight_decay=decay)
    weights = {"matrix": mx.full((64, 64), 0.02)}
    gradients = {"matrix": mx.full((64, 64), size) * mx.where(mx.arange(64) % 2, 1, -1)}
    optimizer = Optimizer(config, weights)
    after, _ = optimizer.update(weights, gradients, mx.array(rate))
    moved = after["matrix"] - weights["matrix"]
    assert mx.all(mx.isfinite(moved)) and not mx.any(moved[:, 1] == 0) and mx.all(moved[:, 1] < 0)
    assert mx.abs(moved).max() < 2.5 * rate


def test_the_optimizer_equals_clipping_and_adamw_of_mlx() -> None:
    config = tiny(warmup_steps=0, max_steps=10, learning_rate=0.1, max_gradient_norm=0.5)
    parameters = {"matrix": mx.random.normal((5, 3)), "bias": mx.random.normal((7,))}
    expected = dict(parameters)
    ours = Optimizer(config, parameters)
    theirs = {
        name: optim.AdamW(0.0, betas=[0.9, 0.95], weight_decay=0.1 * (name == "matrix"), bias_correction=True)
        for name in parameters
    }
    for step in range(4):
        gradients = {name: mx.random.normal(array.shape) * 10**-step for name, array in parameters.items()}
        rate = mx.array(config.learning_rate_at(step))
        parameters, norm = ours.update(parameters, gradients, rate)
        clipped, plain_norm = optim.clip_grad_norm(gradients, 0.5)
        assert norm.item() == pytest.approx(plain_norm.item(), rel=1e-6)
        for name, optimizer in theirs.items():
            optimizer.learning_rate = rate
            expected[name] = optimizer.apply_gradients({name: clipped[name]}, {name: expected[name]})[name]
            assert mx.allclose(parameters[name], expected[name], rtol=1e-5, atol=1e-6)
