"""On a CPU, the losses and gradients of the library equal those of the model in MLX, in every shape.

Shapes: B rows, T tokens, C width.
"""

import ctypes
import platform
import shutil
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from shared.device import native
from shared.device.native import BASELINES, VECTOR_OPTIONS, build_library
from shared.errors import InvalidArgument
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from tests.decoders import COMPILED
from tests.shared.gpt.random_models import models, random_model, random_tokens, seeds
from trainer_service.training.cpu import library as module
from trainer_service.training.cpu.library import Dropout, Scratch, Task, TrainingLibrary, load_library
from trainer_service.training.cpu.model import CpuModel
from trainer_service.training.loss import Distillation, mean_loss, token_losses
from trainer_service.training.token_losses import TokenLosses

# Relative to the largest element of an array.
TOLERANCE = 2e-5

# Widths that are no multiples of a vector or of a tile, and more than what is summed at a time; contexts of more
# queries than a block has, and vocabularies of more tokens than a block.
SHAPES = {
    "11": GPTConfig(2, 33, 3, 100, 45, 61, tied_head=False),
    "24": GPTConfig(1, 72, 3, 130, 70, 257, tied_head=True),
    "48": GPTConfig(2, 96, 2, 384, 130, 5003, tied_head=False),
    "128": GPTConfig(1, 512, 4, 900, 200, 97, tied_head=True),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())


@dataclass(frozen=True)
class Case:
    """A task, and what MLX needs to take it."""

    model: GPT
    task: Task
    weights: np.ndarray
    distillation: Distillation | None = None


def make_case(model: GPT, seed: int, rows: int, teachers: tuple[GPT, ...] = (), masked: bool = False) -> Case:
    """Returns a case with random weights of the targets, of which some are 0."""
    generator = np.random.default_rng(seed)
    T = model.config.context_length
    tokens = random_tokens(model.config, seed, rows, T + 1).astype(np.int32)
    tokens[0, 1], tokens[-1, -1] = 0, model.config.vocabulary_size - 1
    weights = generator.integers(0, 3, (rows, T)).astype(np.float32)
    kept = (generator.random((rows, T)) < 0.7).astype(np.float32) if masked else None
    distillation = Distillation(teachers, 0.6, 1.7) if teachers else None
    task = Task(tokens[:, :-1], tokens[:, 1:], weights / np.float32(weights.size), kept)
    if teachers:
        task = replace(task, teachers=[CpuModel.of(each) for each in teachers], alpha=0.6, temperature=1.7)
    return Case(model, task, weights, distillation)


def by_library(library: TrainingLibrary, case: Case, before: float = 0.0) -> tuple[float, dict[str, np.ndarray]]:
    """Returns the loss and the slopes, added to numbers `before`; nothing but these may change."""
    model = case.model
    weights = {name: np.array(array) for name, array in parameters_of(model).items()}
    slopes = {name: np.full(array.shape, before, np.float32) for name, array in weights.items()}
    scratch = GuardedScratch()
    loss = library.add_gradients(CpuModel.of(model), case.task, CpuModel(model.config, 1e-5, slopes), scratch)
    scratch.check()
    for name, array in parameters_of(model).items():
        np.testing.assert_array_equal(array, weights[name])
    return loss, slopes


class GuardedScratch(Scratch):
    """Memory of NaN that knows whether something was written behind it."""

    def reserve(self, numbers: int) -> int:
        begin = super().reserve(numbers + 1024)
        held = np.ctypeslib.as_array((ctypes.c_float * (numbers + 1024)).from_address(begin))
        held[:] = np.nan
        self._behind = held[numbers:]
        return begin

    def check(self) -> None:
        assert np.isnan(self._behind).all()


def by_mlx(case: Case) -> tuple[float, dict[str, np.ndarray]]:
    task = case.task
    kept = None if task.kept is None else mx.array(task.kept)[..., None]
    take = nn.value_and_grad(
        case.model, partial(mean_loss, weights=mx.array(case.weights), distillation=case.distillation, kept=kept)
    )
    loss, gradients = take(case.model, mx.array(task.inputs), mx.array(task.targets))
    return loss.item(), {name: np.array(array) for name, array in dict(tree_flatten(gradients)).items()}


def assert_agrees(case: Case, library: TrainingLibrary | None = None) -> None:
    loss, slopes = by_library(library or load_library(), case)
    expected_loss, expected = by_mlx(case)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert slopes.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(slopes[name], array, rtol=0, atol=TOLERANCE * np.abs(array).max(), err_msg=name)


@shapes
@pytest.mark.parametrize("rows", [1, 3])
def test_loss_and_gradients_are_those_of_mlx(config: GPTConfig, rows: int) -> None:
    assert_agrees(make_case(random_model(config, 1), 2, rows))


@shapes
def test_masked_inputs_show_only_their_positions(config: GPTConfig) -> None:
    assert_agrees(make_case(random_model(config, 1), 3, 2, masked=True))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", ["11", "48"])
def test_a_student_learns_from_teachers_of_other_shapes(shape: str, count: int) -> None:
    config = SHAPES[shape]
    wide = replace(config, layers=3, width=4 * config.width, heads=4, context_length=2 * config.context_length)
    teachers = tuple(map(random_model, (wide, replace(config, tied_head=True)), (5, 6)))[:count]
    assert_agrees(make_case(random_model(config, 1), 4, 2, teachers, masked=True))


@settings(max_examples=60)
@given(model=models(longest_context=40), seed=seeds, rows=st.integers(1, 5), masked=st.booleans())
def test_any_shape_agrees(model: GPT, seed: int, rows: int, masked: bool) -> None:
    case = make_case(model, seed, rows, masked=masked)
    loss, slopes = by_library(load_library(), case)
    expected_loss, expected = by_mlx(case)
    assert loss == pytest.approx(expected_loss, rel=1e-4, abs=1e-6)
    largest = max(np.abs(array).max() for array in expected.values())
    for name, array in expected.items():
        # The LayerNorm of few numbers amplifies rounding.
        np.testing.assert_allclose(slopes[name], array, rtol=0, atol=1e-3 * largest, err_msg=name)


def test_gradients_are_added() -> None:
    case = make_case(random_model(SHAPES["24"], 1), 2, 2)
    _, alone = by_library(load_library(), case)
    _, added = by_library(load_library(), case, before=0.5)
    for name, array in alone.items():
        np.testing.assert_allclose(added[name], 0.5 + array, atol=2e-6, err_msg=name)


def hashed(dropout: Dropout, size: int) -> np.ndarray:
    """Returns the factors of numbers, by the formula of `Dropout` in NumPy."""
    x = (np.arange(size, dtype=np.uint64) + dropout.first) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15) ^ dropout.second) * 0x846CA68B) & 0xFFFFFFFF
    return np.where(x >> 8 >= dropout.least, np.float32(dropout.scale), np.float32(0))


@pytest.mark.parametrize("shape", ["11", "128"])
def test_dropout_drops_embeddings_outputs_and_whole_values(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SHAPES[shape], dropout=0.25)
    case = make_case(random_model(config, 1), 2, 2)
    numbers = np.random.default_rng(3).integers(1 << 24, size=(1 + 3 * config.layers, 2)).tolist()
    dropouts = [Dropout(first, second, 1 << 22, 1 / 0.75) for first, second in numbers]
    case = replace(case, task=replace(case.task, dropouts=(Dropout * len(dropouts))(*dropouts)))
    following = iter(dropouts)

    def drop(x: mx.array, rate: float, shape: tuple[int, ...]) -> mx.array:
        assert rate == 0.25
        return x * mx.array(hashed(next(following), int(np.prod(shape))).reshape(shape))

    monkeypatch.setattr("shared.gpt.model.dropout", drop)
    case.model.train()
    assert_agrees(case)
    # Every one was used.
    assert next(following, None) is None


def test_the_hash_drops_the_share_and_its_numbers_are_independent() -> None:
    """Of the formula, which the test above compares with the library."""
    size = 40_000
    first, second = (hashed(Dropout(*numbers, 1 << 22, 1.0), size) for numbers in ((11, 7_000_001), (12, 345)))
    # Five standard deviations of a share.
    assert first.mean() == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / size) ** 0.5)
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, 3, 4, 8, 16, 64, 100, 256, 1024, 4096)]
    pairs += [(first, second), (first[1:], second[:-1]), (first[:-1], second[1:])]
    for one, other in pairs:
        # The correlation of independent numbers has the standard deviation 1 / sqrt(count).
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / one.size**0.5


@shapes
def test_the_losses_of_tokens_are_those_of_mlx_and_a_row_does_not_change_another(config: GPTConfig) -> None:
    model = random_model(config, 1)
    tokens = random_tokens(config, 2, 5, config.context_length + 1).astype(np.int32)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    scratch = GuardedScratch()
    losses = load_library().losses(CpuModel.of(model), inputs, targets, scratch)
    scratch.check()
    np.testing.assert_allclose(losses, token_losses(model, mx.array(inputs), mx.array(targets)), rtol=1e-4, atol=2e-5)
    for row in range(5):
        alone = load_library().losses(CpuModel.of(model), inputs[row : row + 1], targets[row : row + 1], scratch)
        np.testing.assert_array_equal(losses[row], alone[0])


def test_a_text_that_is_shorter_than_the_context_has_the_losses_of_its_beginning() -> None:
    model = random_model(SHAPES["48"], 1)
    tokens = random_tokens(model.config, 2, 2, 131).astype(np.int32)
    whole, part = (
        load_library().losses(CpuModel.of(model), tokens[:, :size], tokens[:, 1 : size + 1], Scratch())
        for size in (130, 33)
    )
    np.testing.assert_allclose(whole[:, :33], part, rtol=1e-5)


def test_a_text_that_does_not_fit_the_context_is_refused() -> None:
    tokens = np.zeros((1, 46), np.int32)
    with pytest.raises(InvalidArgument, match=r"^46 tokens do not fit the context of 45\.$"):
        TokenLosses(random_model(SHAPES["11"], 1))(tokens, tokens)


def test_the_library_loads_once_and_may_begin_before_it_is_needed() -> None:
    module.begin_loading()
    assert load_library() is load_library()


@pytest.mark.parametrize("tied_head", [True, False])
def test_extreme_logits_agree(tied_head: bool) -> None:
    model = random_model(replace(SHAPES["11"], tied_head=tied_head), 1)
    case = make_case(model, 2, 2)
    model.final_norm.bias = mx.zeros_like(model.final_norm.bias)
    logits = model(mx.array(case.task.inputs))
    model.final_norm.weight = model.final_norm.weight * (81 / mx.minimum(logits.max(), -logits.min()))
    logits = model(mx.array(case.task.inputs))
    assert float(logits.min()) < -80 and float(logits.max()) > 80
    assert_agrees(case)
    assert_agrees(replace(case, task=replace(case.task, targets=np.array(mx.argmin(logits, axis=-1), np.int32))))


@pytest.mark.parametrize(
    "name", ["token_embedding.weight", "blocks.1.attention.qkv.weight", "blocks.0.feed_forward.up.bias"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_give_a_loss_that_is_not_finite(name: str, value: float) -> None:
    model = random_model(SHAPES["11"], 1)
    case = make_case(model, 2, 2)
    damaged = np.array(parameters_of(model)[name])
    damaged[case.task.inputs[0, 0] if "token" in name else 5] = value
    model.load_weights([(name, mx.array(damaged))], strict=False)
    loss, _ = by_library(load_library(), case)
    assert not np.isfinite(loss)
    losses = load_library().losses(CpuModel.of(model), case.task.inputs, case.task.targets, Scratch())
    assert not np.isfinite(losses[0]).all()


def test_a_teacher_whose_predictions_are_not_finite_gives_gradients_that_are_not_finite() -> None:
    model, teacher = random_model(SHAPES["11"], 1), random_model(SHAPES["11"], 2)
    teacher.final_norm.bias = mx.full((33,), mx.nan)
    _, slopes = by_library(load_library(), make_case(model, 2, 2, (teacher,)))
    assert np.isnan(slopes["head.weight"]).any()


def assert_library_agrees(library: TrainingLibrary) -> None:
    for shape in ("11", "48"):
        assert_agrees(make_case(random_model(SHAPES[shape], 1), 2, 2, masked=True), library)


@pytest.mark.parametrize("name", ["x86-64", "haswell", "x86-64-v4"])
def test_vectors_of_every_width_agree_with_mlx(name: str) -> None:
    """With vectors of 4, 8 and 16 numbers."""
    if platform.machine() != "x86_64":
        pytest.skip("These are x86-64 processors.")
    needed = {"x86-64": set[str](), "haswell": {"avx2", "fma", "bmi2"}, "x86-64-v4": BASELINES["x86_64"][2].features}
    if not needed[name] <= set(native._processor().split()):
        pytest.skip(f"This processor is older than {name}.")
    options = [*VECTOR_OPTIONS, f"-march={name}"]
    assert_library_agrees(TrainingLibrary(build_library(module._source(), options, COMPILED)))


def test_clang_compiles_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang is not installed.")
    monkeypatch.setattr(shutil, "which", {"clang++": clang}.get)
    assert_library_agrees(TrainingLibrary(build_library(module._source(), VECTOR_OPTIONS, COMPILED / "clang")))
