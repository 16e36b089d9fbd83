import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.training.batches import TeacherText, TrainingText, batch

TOKENS = (np.arange(5000) * 7 % 300).astype(np.uint16)
# Tokens that the other text does not have.
TEACHER = TOKENS[:2000] + np.uint16(300)


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    def windows(seed: int, step: int) -> np.ndarray:
        text = TrainingText(TOKENS, TeacherText(TEACHER))
        return batch(text, seed=seed, step=step, rows=8, context_length=8, teacher_share=0.5).inputs

    np.testing.assert_array_equal(windows(1, 5), windows(1, 5))
    assert not np.array_equal(windows(1, 5), windows(1, 6))
    assert not np.array_equal(windows(1, 5), windows(2, 5))


def test_targets_are_the_inputs_one_token_later() -> None:
    drawn = batch(TrainingText(TOKENS), seed=1, step=1, rows=64, context_length=8)
    np.testing.assert_array_equal(drawn.inputs[:, 1:], drawn.targets[:, :-1])
    np.testing.assert_array_equal((drawn.inputs[:, -1] + 7) % 300, drawn.targets[:, -1])


def test_a_text_of_one_window_is_enough() -> None:
    text = TrainingText(TOKENS[:9], TeacherText(TEACHER[:9]))
    for share, tokens in ((0.0, TOKENS), (1.0, TEACHER)):
        drawn = batch(text, seed=1, step=1, rows=2, context_length=8, teacher_share=share)
        np.testing.assert_array_equal(drawn.inputs, np.stack([tokens[:8]] * 2))


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**9), share=st.floats(0, 1))
def test_a_plain_text_ignores_the_share_and_draws_the_starts_from_philox(seed: int, step: int, share: float) -> None:
    drawn = batch(TrainingText(TOKENS), seed=seed, step=step, rows=6, context_length=8, teacher_share=share)
    starts = np.random.Generator(np.random.Philox(key=[seed, step])).integers(0, TOKENS.size - 8, size=6)
    np.testing.assert_array_equal(drawn.inputs, np.stack([TOKENS[start : start + 8] for start in starts]))
    assert drawn.weights is None


def test_a_mixture_has_the_share_of_the_teacher_and_else_the_windows_of_the_plain_text() -> None:
    values = {"seed": 3, "step": 4, "rows": 4000, "context_length": 8}
    plain = batch(TrainingText(TOKENS), **values)
    mixed = batch(TrainingText(TOKENS, TeacherText(TEACHER)), **values, teacher_share=0.3)
    taught = mixed.inputs[:, 0] >= 300
    assert abs(taught.mean() - 0.3) < 0.03
    np.testing.assert_array_equal((mixed.inputs >= 300).all(axis=1), taught)
    np.testing.assert_array_equal(mixed.inputs[~taught], plain.inputs[~taught])
    assert mixed.weights is None
    assert len(np.unique(mixed.inputs[taught, 0])) > 250


def test_weights_are_0_for_targets_that_do_not_count_and_have_a_mean_of_1() -> None:
    text = TrainingText(TOKENS, TeacherText(np.arange(2000, dtype=np.uint16) + 300, np.arange(2000) % 5 > 1))
    drawn = batch(text, seed=1, step=2, rows=64, context_length=8, teacher_share=0.5)
    assert drawn.weights is not None and drawn.weights.dtype == np.float32
    counted = (drawn.targets < 300) | ((drawn.targets - 300) % 5 > 1)
    np.testing.assert_array_equal(drawn.weights > 0, counted)
    np.testing.assert_allclose(drawn.weights[counted], counted.size / counted.sum(), rtol=1e-6)
    part = drawn.part(3, 7)
    for name in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(getattr(part, name), getattr(drawn, name)[3:7])


def test_a_batch_in_which_no_target_counts_has_weights_of_0() -> None:
    text = TrainingText(TOKENS, TeacherText(TEACHER, np.zeros(2000, np.bool_)))
    drawn = batch(text, seed=1, step=2, rows=4, context_length=8, teacher_share=1.0)
    assert drawn.weights is not None and not drawn.weights.any()
