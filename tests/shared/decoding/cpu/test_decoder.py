"""On a CPU, the bits of a row depend only on the tokens of its slot, and they are right in every shape.

Shapes: T tokens, V vocabulary.
"""

import mmap
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from shared.decoding.cpu import library as module
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.cpu.library import CpuLibrary, load_library
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from shared.device import native
from shared.device.accelerator import memory
from shared.device.native import BASELINES, Baseline, build_library
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.decoders import COMPILED, cpu_decoder, cpu_library
from tests.shared.decoding.cpu.reference import reference_forward
from tests.shared.gpt.random_models import forward, full_forward, models, random_model, random_text, seeds

# Relative to the largest logit.
TOLERANCE = 5e-6

# Head widths from 8 to 80; most other widths are not multiples of a vector, and no context is one of a span.
SHAPES = {
    "8": GPTConfig(2, 24, 3, 50, 70, 97, tied_head=True),
    "11": GPTConfig(2, 33, 3, 100, 45, 61, tied_head=False),
    "12": GPTConfig(2, 36, 3, 77, 70, 257, tied_head=False),
    "24": GPTConfig(1, 72, 3, 130, 70, 257, tied_head=True),
    "48": GPTConfig(1, 96, 2, 384, 70, 257, tied_head=False),
    "64": GPTConfig(2, 64, 1, 256, 130, 97, tied_head=True),
    "80": GPTConfig(1, 160, 2, 640, 70, 257, tied_head=False),
}
shapes = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
formats = pytest.mark.parametrize("weights", WeightFormat)


def decode_alone(
    model: GPT,
    tokens: Sequence[int],
    weights: WeightFormat = WeightFormat.FP32,
    library: CpuLibrary | None = None,
) -> np.ndarray:
    """Returns the logits (T, V) after each token, computed one by one."""
    decoder = CpuDecoder(model, 1, 1, library or cpu_library(), weights)
    return np.stack([forward(decoder, [Span(0, place, (token,))])[0] for place, token in enumerate(tokens)])


def assert_agrees(model: GPT, tokens: Sequence[int], logits: np.ndarray, tolerance: float = TOLERANCE) -> None:
    expected = full_forward(model, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same_bits_in_any_company(
    model: GPT, threads: int, weights: WeightFormat, library: CpuLibrary | None = None
) -> None:
    """Compares 1 to 40 slots in a step, each at another position, after prompts that were read in one step."""
    library = library or cpu_library()
    text = random_text(model.config, 3, model.config.context_length)
    expected = decode_alone(model, text, weights, library)
    decoder = CpuDecoder(model, 40, threads, library, weights)
    starts = [1 + slot % (len(text) - 1) for slot in range(40)]
    for start, logits in zip(
        starts,
        forward(decoder, [Span(slot, 0, text[:start]) for slot, start in enumerate(starts)]),
        strict=True,
    ):
        assert np.array_equal(logits, expected[start - 1])
    spans = [Span(slot, start, (text[start],)) for slot, start in enumerate(starts)]
    for rows in range(1, 41):
        for span, logits in zip(spans[:rows], forward(decoder, spans[:rows]), strict=True):
            assert np.array_equal(logits, expected[span.start])


def assert_rounds_as_described(model: GPT, weights: WeightFormat, library: CpuLibrary | None = None) -> None:
    """Compares a short text with the reference; a long one has places where it is chance which number is nearest."""
    text = random_text(model.config, 2, min(24, model.config.context_length))
    expected = reference_forward(model, text, weights)
    errors = np.abs(decode_alone(model, text, weights, library) - expected) / np.abs(expected).max()
    assert np.quantile(errors, 0.75) < 2e-6
    # In other formats than fp32, a number may have been rounded to the other side.
    assert errors.max() < (TOLERANCE if weights is WeightFormat.FP32 else 2e-2)


@formats
@shapes
def test_numbers_are_rounded_as_the_format_says(config: GPTConfig, weights: WeightFormat) -> None:
    assert_rounds_as_described(random_model(config, 1), weights)


def assert_a_long_text_agrees(model: GPT, weights: WeightFormat, library: CpuLibrary | None = None) -> None:
    text = random_text(model.config, 2, model.config.context_length)
    tolerance = {WeightFormat.FP32: TOLERANCE, WeightFormat.BF16: 5e-3, WeightFormat.INT8: 5e-2}[weights]
    assert_agrees(model, text, decode_alone(model, text, weights, library), tolerance)


@formats
@shapes
def test_a_long_text_agrees_with_the_plain_forward(config: GPTConfig, weights: WeightFormat) -> None:
    assert_a_long_text_agrees(random_model(config, 1), weights)


@pytest.mark.parametrize("threads", [1, 2])
@formats
@shapes
def test_rows_threads_and_slots_do_not_change_one_bit(config: GPTConfig, weights: WeightFormat, threads: int) -> None:
    assert_same_bits_in_any_company(random_model(config, 1), threads, weights)


def test_a_vector_can_be_read_behind_the_values_of_the_last_slot() -> None:
    """Where they end with a page of memory, too."""
    decoder = cpu_decoder(random_model(replace(SHAPES["64"], context_length=256), 1), 2)
    for _, values in decoder._caches:
        memory: Any = values
        while isinstance(memory, np.ndarray):
            memory = memory.base
        assert values.nbytes % mmap.PAGESIZE == 0
        assert memoryview(memory).nbytes >= values.nbytes + cpu_library().vector_width * values.itemsize


def test_formats_take_the_memory_of_their_bytes() -> None:
    model = random_model(replace(SHAPES["64"], width=256, vocabulary_size=1000, context_length=2), 1)
    sizes = [cpu_decoder(model, 1, 1, weights).memory_bytes for weights in WeightFormat]
    fp32, bf16, int8 = sizes
    assert 1.9 < fp32 / bf16 < 2.0 and 3.5 < fp32 / int8 < 4.0
    assert cpu_decoder(model, 1, 1, WeightFormat.FP32).bytes_per_token == 2 * 2 * 256 * 4
    assert cpu_decoder(model, 1, 1, WeightFormat.INT8).bytes_per_token == 2 * 2 * 256 * 2


@formats
def test_weights_that_are_zero_stay_zero(weights: WeightFormat) -> None:
    model = random_model(SHAPES["11"], 1)
    for block in model.blocks:
        block.feed_forward.up.weight = mx.zeros_like(block.feed_forward.up.weight)
    assert_rounds_as_described(model, weights)


@pytest.fixture(params=["x86-64", "haswell", "haswell -mtune=znver3", "x86-64-v4", "x86-64-v4 -mtune=znver3"])
def other_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CpuLibrary:
    """Compiles the library for processors with vectors of 4 or of 8 numbers, or without int8 dot products; and for one
    for which GCC fuses fewer products with sums."""
    if platform.machine() != "x86_64":
        pytest.skip("These are x86-64 processors.")
    needed = {"x86-64": set[str](), "haswell": {"avx2", "fma", "bmi2"}, "x86-64-v4": BASELINES["x86_64"][2].features}
    name, *tuned = request.param.split()
    if not needed[name] <= set(native._processor().split()):
        pytest.skip(f"This processor is older than {name}.")

    def build(source: str, options: Sequence[str], cache: Path) -> Path:
        assert "-march=native" in options
        return build_library(source, [*options, f"-march={name}", *tuned], cache)

    monkeypatch.setattr(module, "build_library", build)
    library = load_library(COMPILED)
    assert library.vector_width == {"x86-64": 4, "haswell": 8, "x86-64-v4": 16}[name]
    return library


@formats
@pytest.mark.parametrize("shape", ["11", "24", "48"])
def test_other_processors_give_the_same_results(other_library: CpuLibrary, shape: str, weights: WeightFormat) -> None:
    model = random_model(SHAPES[shape], 1)
    assert_rounds_as_described(model, weights, other_library)
    assert_a_long_text_agrees(model, weights, other_library)
    assert_same_bits_in_any_company(model, 2, weights, other_library)


# Widths that are one part, three and a half parts, and a part and a half; 1 to 40 rows, and prompts of more than 96.
@pytest.mark.parametrize(("width", "hidden"), [(64, 448), (192, 768)])
def test_tiles_give_the_bits_of_vectors(width: int, hidden: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if "amx_int8" not in native._processor().split() or not cpu_library().has_tiles:
        pytest.skip("This processor has no tiles of int8, or the system does not lend them.")
    config = GPTConfig(1, width, 2, hidden, 150, 97, tied_head=False)
    model = random_model(config, 1)
    assert_same_bits_in_any_company(model, 2, WeightFormat.INT8)
    text = random_text(config, 3, config.context_length)
    by_tiles = forward(CpuDecoder(model, 1, 1, cpu_library(), WeightFormat.INT8), [Span(0, 0, text)])
    monkeypatch.setattr(module, "_OPTIONS", [*module._OPTIONS, "-mno-amx-int8"])
    vectors = load_library(COMPILED)
    assert not vectors.has_tiles
    assert np.array_equal(by_tiles, forward(CpuDecoder(model, 1, 1, vectors, WeightFormat.INT8), [Span(0, 0, text)]))
    assert np.array_equal(by_tiles[0], decode_alone(model, text, WeightFormat.INT8, vectors)[-1])


@formats
def test_clang_compiles_it_too(monkeypatch: pytest.MonkeyPatch, weights: WeightFormat) -> None:
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("clang is not installed.")
    monkeypatch.setattr(shutil, "which", {"clang++": clang}.get)
    # Its OpenMP is another package.
    monkeypatch.setattr(module, "_OPTIONS", [each for each in module._OPTIONS if each != "-fopenmp"])
    library = load_library(COMPILED)
    model = random_model(SHAPES["48"], 1)
    assert_rounds_as_described(model, weights, library)
    assert_a_long_text_agrees(model, weights, library)
    assert_same_bits_in_any_company(model, 1, weights, library)


@pytest.mark.parametrize(
    "baseline",
    BASELINES.get(platform.machine(), ()),
    ids=lambda baseline: "".join((baseline.name, *baseline.more_options)),
)
def test_a_prebuilt_library_gives_the_same_results(
    baseline: Baseline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not baseline.features <= set(native._processor().split()):
        pytest.skip(f"This processor is older than {baseline.name}.")
    monkeypatch.setattr(native, "PREBUILT", COMPILED / "prebuilt")
    monkeypatch.setattr(native, "_processor", lambda: " ".join(baseline.features))
    module.prebuild(native.PREBUILT)
    # Without a compiler.
    monkeypatch.setenv("PATH", str(tmp_path))
    library = load_library(tmp_path)
    model = random_model(SHAPES["48"], 1)
    for weights in WeightFormat:
        assert_rounds_as_described(model, weights, library)
        assert_a_long_text_agrees(model, weights, library)
        assert_same_bits_in_any_company(model, 2, weights, library)


class Bits(RuleBasedStateMachine):
    """Sequences of one text in slots, computed in any chunks, copied and read back."""

    SLOTS = 5

    @initialize(
        model=models(longest_context=150), seed=seeds, threads=st.integers(1, 2), weights=st.sampled_from(WeightFormat)
    )
    def begin(self, model: GPT, seed: int, threads: int, weights: WeightFormat) -> None:
        self.length = model.config.context_length
        self.text = random_text(model.config, seed, self.length)
        self.expected = decode_alone(model, self.text, weights)
        self.decoder = cpu_decoder(model, self.SLOTS, threads, weights)
        self.read = [0] * self.SLOTS

    @rule(data=st.data(), slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
    def read_tokens(self, data: st.DataObject, slots: list[int]) -> None:
        spans = []
        for slot in slots:
            # From any computed position, so that a sequence can also start again.
            start = data.draw(st.integers(0, min(self.read[slot], self.length - 1)), "start")
            cuts = data.draw(st.sets(st.integers(start + 1, self.length), min_size=1, max_size=3), "cuts")
            for end in sorted(cuts):
                spans.append(Span(slot, start, self.text[start:end]))
                start = end
            self.read[slot] = start
        for span, logits in zip(spans, forward(self.decoder, spans), strict=True):
            assert np.array_equal(logits, self.expected[span.start + len(span.tokens) - 1])

    @rule(data=st.data(), source=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1))
    def copy(self, data: st.DataObject, source: int, other: int) -> None:
        length = data.draw(st.integers(0, self.read[source]), "length")
        self.decoder.copy(source, [other], length)
        self.read[other] = length

    @rule(data=st.data(), source=st.integers(0, SLOTS - 1), other=st.integers(0, SLOTS - 1))
    def read_and_write(self, data: st.DataObject, source: int, other: int) -> None:
        blocks = min(self.read[source], self.read[other]) // SPAN_TOKENS
        start = SPAN_TOKENS * data.draw(st.integers(0, blocks), "blocks")
        end = data.draw(st.integers(start, self.read[source]), "end")
        self.decoder.write(other, start, self.decoder.read(source, start, end))
        self.read[other] = end


def test_chunks_copies_and_neighbours_do_not_change_one_bit() -> None:
    run_state_machine_as_test(Bits, settings=settings(max_examples=60, stateful_step_count=12))


# Numbers that a good model does not have


@formats
def test_nan_stays_in_its_row_and_leaves_with_it(weights: WeightFormat) -> None:
    config = SHAPES["12"]
    spoiled = config.vocabulary_size - 1
    model = random_model(config, 1)
    text = random_text(replace(config, vocabulary_size=spoiled), 2, 40)
    expected = decode_alone(model, text, weights)
    model.token_embedding.weight[spoiled] = mx.nan
    decoder = cpu_decoder(model, 1, 1, weights)
    # All rows in one step: only those after the token attend to it.
    tokens = (*text[:20], spoiled, *text[21:])
    logits = np.stack(forward(decoder, [Span(0, place, (token,)) for place, token in enumerate(tokens)]))
    assert np.array_equal(logits[:20], expected[:20])
    assert np.isnan(logits[20:]).all()
    # The slot is not cleared, and continues from a position before the token.
    assert np.array_equal(forward(decoder, [Span(0, 15, text[15:21])])[0], expected[20])
    assert np.array_equal(forward(decoder, [Span(0, 0, text)])[0], expected[-1])


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_numbers_do_not_overflow_in_the_activation(size: float) -> None:
    config = SHAPES["12"]
    model = random_model(config, 1)
    for block in model.blocks:
        block.feed_forward.up.bias = mx.linspace(-size, size, config.hidden_width)
    text = random_text(config, 2, 40)
    assert_agrees(model, text, decode_alone(model, text))


# The last digits of a large score change its weight a lot.
@pytest.mark.parametrize(("size", "tolerance"), [(100.0, 1e-5), (1e4, 1e-3)])
def test_large_scores_do_not_overflow_in_the_softmax(size: float, tolerance: float) -> None:
    config = SHAPES["12"]
    model = random_model(config, 1)
    for block in model.blocks:
        # All queries and all keys are large in one direction.
        bias = block.attention.qkv.bias
        bias[: config.width] += 10.0
        bias[config.width : 2 * config.width] += size / 10 / config.head_width**0.5
    text = random_text(config, 2, 40)
    assert_agrees(model, text, decode_alone(model, text), tolerance)


def test_a_slot_takes_memory_only_for_its_tokens() -> None:
    slots = 128
    decoder = cpu_decoder(random_model(replace(SHAPES["64"], context_length=4096), 1), slots, 1)
    whole = slots * 4096 * decoder.bytes_per_token
    assert whole > 256 << 20
    before = memory().resident_bytes
    for slot in range(slots):
        decoder.forward([Span(slot, 0, (1,))])
    assert memory().resident_bytes - before < whole / 8
