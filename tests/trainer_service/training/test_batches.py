from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_service.training.tiny_runs import END, TOKENS
from trainer_service.training.batches import Batches, TeacherText, TrainingText

PLAIN = TrainingText(TOKENS, END)
# Tokens that the other text does not have.
TEACHER = TOKENS[:2000] + np.uint16(300)
MIXED = TrainingText(TOKENS, END, TeacherText(TEACHER))


def batches(text: TrainingText = PLAIN, seed: int = 1, rows: int = 8, share: float = 0.5) -> Batches:
    return Batches(text, seed=seed, rows=rows, context_length=8, teacher_share=share)


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    # Windows of the text, of both, and of the teacher's.
    for share in (0.0, 0.5, 1.0):

        def windows(seed: int, step: int, share: float = share) -> np.ndarray:
            return batches(MIXED, seed, share=share).at(step).inputs

        np.testing.assert_array_equal(windows(1, 5), windows(1, 5))
        assert not np.array_equal(windows(1, 5), windows(1, 6))
        assert not np.array_equal(windows(1, 5), windows(2, 5))


def test_targets_are_the_inputs_one_token_later() -> None:
    drawn = batches(rows=64).at(1)
    np.testing.assert_array_equal(drawn.inputs[:, 1:], drawn.targets[:, :-1])
    # TOKENS are so regular that the next token of a document is known.
    inside = drawn.inputs != END
    np.testing.assert_array_equal(((drawn.inputs + 7) % 300)[inside], drawn.targets[inside])


def test_a_text_of_one_window_is_enough() -> None:
    text = TrainingText(TOKENS[1:10], END, TeacherText(TEACHER[1:10]))
    for share, tokens in ((0.0, TOKENS), (1.0, TEACHER)):
        drawn = batches(text, rows=2, share=share).at(1)
        np.testing.assert_array_equal(drawn.inputs, np.stack([tokens[1:9]] * 2))
        np.testing.assert_array_equal(drawn.targets, np.stack([tokens[2:10]] * 2))


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**9), share=st.floats(0, 1))
def test_a_plain_text_ignores_the_share(seed: int, step: int, share: float) -> None:
    drawn = batches(seed=seed, share=share).at(step)
    np.testing.assert_array_equal(drawn.inputs, batches(seed=seed, share=0.0).at(step).inputs)
    assert drawn.weights is None and drawn.inputs.shape == (8, 8) and drawn.inputs.max() < 300


@given(share=st.floats(0, 1), step=st.integers(0, 10**9))
def test_the_windows_of_a_teacher_are_evenly_spread(share: float, step: int) -> None:
    drawn = batches(MIXED, rows=50, share=share).at(step)
    taught = drawn.inputs >= 300
    np.testing.assert_array_equal(taught, np.repeat(taught[:, :1], 8, axis=1))
    assert abs(np.arange(51) * share - np.concatenate([[0], taught[:, 0].cumsum()])).max() < 1.001


@given(share=st.floats(0.1, 0.9))
def test_a_mixture_reads_both_texts_in_the_order_in_which_each_is_read_alone(share: float) -> None:
    drawn = batches(MIXED, rows=100, share=share).at(0).inputs
    taught = drawn[:, 0] >= 300
    own, others = batches(rows=100).at(0).inputs, batches(MIXED, rows=100, share=1.0).at(0).inputs
    np.testing.assert_array_equal(drawn[~taught], own[: (~taught).sum()])
    np.testing.assert_array_equal(drawn[taught], others[: taught.sum()])


def test_rows_have_the_same_windows_in_batches_of_any_size() -> None:
    for text in (PLAIN, MIXED):
        small = [batches(text, rows=3, share=0.3).at(step).inputs for step in range(4)]
        np.testing.assert_array_equal(np.concatenate(small), batches(text, rows=12, share=0.3).at(0).inputs)


def test_a_memory_mapped_text_gives_the_same_batches(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", TOKENS)
    text = TrainingText(np.load(tmp_path / "tokens.npy", mmap_mode="r"), END)
    drawn = batches(text).at(3)
    assert type(drawn.inputs) is np.ndarray
    np.testing.assert_array_equal(drawn.inputs, batches().at(3).inputs)


def test_weights_are_0_for_targets_that_do_not_count_and_have_a_mean_of_1() -> None:
    text = TrainingText(TOKENS, END, TeacherText(np.arange(2000, dtype=np.uint16) + 300, np.arange(2000) % 5 > 1))
    drawn = batches(text, rows=64).at(2)
    assert drawn.weights is not None and drawn.weights.dtype == np.float32
    counted = (drawn.targets < 300) | ((drawn.targets - 300) % 5 > 1)
    np.testing.assert_array_equal(drawn.weights > 0, counted)
    np.testing.assert_allclose(drawn.weights[counted], counted.size / counted.sum(), rtol=1e-6)
    part = drawn.part(3, 7)
    for name in ("inputs", "targets", "weights"):
        np.testing.assert_array_equal(getattr(part, name), getattr(drawn, name)[3:7])


def test_a_batch_in_which_no_target_counts_has_weights_of_0() -> None:
    text = TrainingText(TOKENS, END, TeacherText(TEACHER, np.zeros(2000, np.bool_)))
    drawn = batches(text, rows=4, share=1.0).at(2)
    assert drawn.weights is not None and not drawn.weights.any()
