"""The decoder for NVIDIA GPUs, compared with the plain forward of the model: in bf16, so up to its rounding.

Without such a GPU the same kernels run in an emulation.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from shared.decoding.cuda import steps
from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.cuda.program import Blocks, kernels, supports
from shared.decoding.cuda.weights import Product
from shared.decoding.decoder import Decoder
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.device.cuda_driver import CudaError
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.decoders import cuda_decoder
from tests.emulated_gpu import EmulatedGpu
from tests.shared.decoding.cuda.models import TOLERANCE, assert_logits, decoder_for, model_of
from tests.shared.decoding.test_decoders import (
    CONFIG,
    SLOTS,
    SOUND,
    SPOILED,
    Slots,
    spans_of,
    spoiled_model,
)
from tests.shared.decoding.test_draws import draws
from tests.shared.gpt.random_models import forward, full_forward, random_text

pytestmark = pytest.mark.slow

# Widths of whole groups of 32, of a part of one, and above that whose weights a wide block loads early.
SHAPES = [
    replace(CONFIG, width=64, heads=1, hidden_width=96),
    replace(CONFIG, width=260, heads=4, hidden_width=1030, layers=1, tied_head=True, vocabulary_size=65),
    replace(CONFIG, width=1056, heads=11, hidden_width=40, layers=1),
]


def test_logits_agree_with_a_full_forward_after_any_operations() -> None:
    class Made(Slots):
        tolerance = TOLERANCE

        def find_model(self, data: st.DataObject) -> GPT:
            return model_of(CONFIG)

        def make(self, model: GPT) -> Decoder:
            return cuda_decoder(model, SLOTS)

    run_state_machine_as_test(Made, settings=settings(max_examples=8, stateful_step_count=15))


@pytest.mark.parametrize("config", [CONFIG, *SHAPES], ids=lambda config: str(config.width))
def test_neither_the_pieces_of_a_prompt_nor_neighbours_change_one_bit(config: GPTConfig) -> None:
    """Each number of rows has kernels of its own, for products and for logits."""
    # A wide model takes long in the emulation.
    tokens = random_text(config, 1, 70 if config.width < 1000 else 42)
    decoder = decoder_for(config)
    expected = full_forward(model_of(config), tokens)
    single = [forward(decoder, [Span(0, place, (token,))])[0] for place, token in enumerate(tokens)]
    assert_logits(np.stack(single), expected)
    # In one step: up to 64 rows, all wanted; and three prompts.
    every = [np.array(decoder.logits(span)[0]) for span in spans_of(1, 0, tokens)]
    assert np.array_equal(np.concatenate(every), np.stack(single))
    spans = [span for slot in (1, 2, 3) for span in spans_of(slot, 0, tokens)]
    for span, logits in zip(spans, forward(decoder, spans), strict=True):
        assert np.array_equal(logits, single[span.start + len(span.tokens) - 1])
    # Some prompts of 10, 20 and 40 tokens beside slots that decode.
    for length in (10, 20, 40):
        forward(decoder, spans_of(0, 0, tokens[:5]))
        beside = [Span(0, 5, tokens[5:6]), Span(1, 0, tokens[:length]), Span(2, 0, (3,))]
        found = forward(decoder, beside)
        assert np.array_equal(found[0], single[5]) and np.array_equal(found[1], single[length - 1])


@pytest.mark.parametrize("wanted", [9, 17, 33, 70])
def test_any_number_of_rows_has_logits(wanted: int) -> None:
    """More than a decoder first has room for, too."""
    decoder = decoder_for(slots=wanted)
    spans = [Span(slot, 0, random_text(CONFIG, slot, 1 + slot % 3)) for slot in range(wanted)]
    alone = decoder_for(slots=2)
    for span, logits in zip(spans, forward(decoder, spans), strict=True):
        assert np.array_equal(logits, forward(alone, [replace(span, slot=0)])[0])


@pytest.mark.parametrize("config", [CONFIG, *SHAPES], ids=lambda config: str(config.width))
def test_blocks_of_any_size_compute_the_same_bits(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 130 if config.width < 1000 else 20
    spans = [Span(slot, 0, (slot % config.vocabulary_size,)) for slot in range(count)]
    expected = forward(decoder_for(config, count), spans)
    computed: set[str] = set()
    for wide, number in product((False, True), range(4)):

        def choose(self: Product, rows: int, multiprocessors: int, wide: bool = wide, number: int = number) -> Blocks:
            sizes = self.sizes(rows, wide=wide)
            chosen = sizes[min(number, len(sizes) - 1)]
            computed.add(chosen.kernel)
            return chosen

        monkeypatch.setattr(Product, "blocks", choose)
        # The head is the same for both, so that its copies to shared memory come late and at once.
        assert np.array_equal(forward(decoder_for(config, count, eager=wide), spans), expected)
    if config == CONFIG:
        assert computed == {name for name in kernels() if name.rpartition("_")[2].isdecimal()}


def test_more_rows_than_the_buffers_hold_are_computed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = forward(
        decoder_for(), [span for slot in range(3) for span in spans_of(slot, 0, random_text(CONFIG, 4, 150))]
    )
    monkeypatch.setattr(steps, "_SIZES", (8, 16, 32, 64))
    decoder = decoder_for()
    spans = [span for slot in range(3) for span in spans_of(slot, 0, random_text(CONFIG, 4, 150))]
    assert np.array_equal(forward(decoder, spans), expected)


def test_the_last_turn_of_a_call_has_room_for_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation notices what is written beyond a buffer."""
    monkeypatch.setattr(steps, "_SIZES", (8, 16, 32, 64))
    decoder, alone = decoder_for(slots=61), decoder_for(slots=2)
    prompt = Span(0, 0, random_text(CONFIG, 1, 64))
    rows = [Span(slot, 0, (slot % 50,)) for slot in range(1, 61)]
    for span, logits in zip([prompt, *rows], forward(decoder, [prompt, *rows]), strict=True):
        assert np.array_equal(logits, forward(alone, [replace(span, slot=0)])[0])


def test_without_memory_for_more_logits_the_decoder_goes_on_with_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = EmulatedGpu()
    decoder = CudaDecoder(model_of(CONFIG), 70, gpu)
    spans = [Span(slot, 0, (slot,)) for slot in range(70)]
    expected = forward(decoder, spans[:1])
    size = gpu.allocated_bytes

    def refuse(size_bytes: int) -> int:
        raise CudaError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(gpu, "allocate", refuse)
        for _ in range(2):
            with pytest.raises(CudaError, match="out of memory"):
                decoder.forward(spans)
    assert np.array_equal(forward(decoder, spans[:1]), expected)
    assert len(decoder.forward(spans)) == 70
    assert gpu.allocated_bytes > size


def test_calls_need_not_wait_for_each_other() -> None:
    """The GPU may still read the memory of the host when the next call comes."""
    tokens = random_text(CONFIG, 1, 70)
    decoder, waiting = decoder_for(slots=3), decoder_for(slots=3)
    first, second = spans_of(0, 0, tokens)
    expected = [*forward(waiting, [first]), *forward(waiting, [second])]
    (after,) = forward(waiting, [Span(0, 70, (1,))])
    decoder.forward([first])
    decoder.forward([second])
    # No page changes with this one.
    (row,) = decoder.forward([Span(0, 70, (1,))])
    assert np.array_equal(np.array(row), after)
    block = decoder.read(0, 0, SPAN_TOKENS)
    (row,) = decoder.forward([replace(first, slot=1, tokens=tokens[1:65])])
    decoder.write(1, 0, block)
    (other,) = forward(waiting, [replace(first, slot=1, tokens=tokens[1:65])])
    assert np.array_equal(np.array(row), other)
    assert np.array_equal(forward(decoder, [replace(second, slot=1)])[0], expected[1])


def test_the_whole_context_can_be_filled() -> None:
    config = replace(CONFIG, context_length=65)
    decoder = decoder_for(config, 2)
    tokens = random_text(config, 2, 65)
    expected = full_forward(model_of(config), tokens)
    for position, token in enumerate(tokens):
        assert_logits(forward(decoder, [Span(0, position, (token,))])[0], expected[position])


def test_earlier_content_of_a_slot_does_not_change_one_bit() -> None:
    new, used = decoder_for(slots=3), decoder_for(slots=3)
    for slot in range(3):
        forward(used, spans_of(slot, 0, random_text(CONFIG, slot, 150)))
    tokens = random_text(CONFIG, 9, 70)
    for spans in [
        spans_of(1, 0, tokens[:66]),
        *([Span(1, place, tokens[place : place + 1])] for place in range(66, 70)),
    ]:
        assert np.array_equal(forward(new, spans), forward(used, spans))


def test_numbers_that_are_not_finite_reach_no_other_slot_and_leave_with_their_sequence() -> None:
    clean, spoiled = cuda_decoder(model_of(CONFIG), 3), cuda_decoder(spoiled_model(), 3)
    texts = [random_text(SOUND, slot, 70) for slot in range(3)]
    for decoder, token in ((clean, 0), (spoiled, SPOILED)):
        forward(decoder, [*spans_of(0, 0, texts[0]), Span(1, 0, (*texts[1][:5], token)), *spans_of(2, 0, texts[2])])
    spans = [Span(0, 70, (3,)), Span(1, 6, (3,)), Span(2, 70, (3,))]
    expected, rows = forward(clean, spans), spoiled.forward(spans)
    tokens = spoiled.draw([draw for row in rows for draw in draws(row, 1.0)])
    assert [token is None for token in tokens] == [False, True, False]
    assert np.isnan(np.array(rows[1])).all()
    for slot in (0, 2):
        assert np.array_equal(np.array(rows[slot]), expected[slot])
    assert np.isnan(spoiled.score(Span(1, 0, (1, SPOILED, 2)), (2, 3, 4)))[1:].all()
    # Without `clear` too: what was in a page before is not read.
    prompt = spans_of(1, 0, texts[1])
    assert np.array_equal(forward(spoiled, prompt), forward(clean, prompt))
    # Nor what a page that is used again holds behind the last position.
    spoiled.clear(0)
    spoiled.forward([Span(0, 0, (*texts[0][:5], SPOILED))])
    spoiled.clear(0)
    assert np.array_equal(forward(spoiled, [Span(0, 0, (3, 4))]), forward(clean, [Span(0, 0, (3, 4))]))


def test_memory_follows_the_tokens_in_use_and_whole_pages_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.decoding.cuda.pages._PIECE_BYTES", 1)  # a piece is a page
    gpu = EmulatedGpu()
    decoder = CudaDecoder(model_of(CONFIG), 64, gpu)
    empty = gpu.allocated_bytes
    page = SPAN_TOKENS * decoder.bytes_per_token

    def pages() -> int:
        return (gpu.allocated_bytes - empty) // page

    tokens = random_text(CONFIG, 1, 70)
    forward(decoder, spans_of(0, 0, tokens))
    assert pages() == 2
    block = decoder.read(0, 0, SPAN_TOKENS)
    decoder.copy(0, [1, 2], 70)
    # The copies share the first page, and each has its own second one, as the block of it had for a moment.
    assert pages() == 5
    expected = forward(decoder, [Span(0, 70, (1,))])[0]
    for slot in (1, 2):
        assert np.array_equal(forward(decoder, [Span(slot, 70, (1,))])[0], expected)
    # Pages without a user are used again.
    for slot in (0, 1, 2):
        decoder.clear(slot)
    decoder.write(3, 0, block)
    forward(decoder, [Span(3, 64, tokens[64:]), *spans_of(4, 0, tokens), *spans_of(5, 0, tokens[:3])])
    assert np.array_equal(forward(decoder, [Span(3, 70, (1,))])[0], expected)
    assert pages() == 5


def test_a_page_that_is_shared_is_copied_before_it_is_written() -> None:
    decoder = decoder_for(slots=2)
    tokens = random_text(CONFIG, 1, 64)
    forward(decoder, spans_of(0, 0, tokens))
    block = decoder.read(0, 0, SPAN_TOKENS)
    expected = forward(decoder, [Span(0, 64, (1,))])[0]
    forward(decoder, [Span(0, 30, (2,))])
    decoder.write(1, 0, block)
    assert np.array_equal(forward(decoder, [Span(1, 64, (1,))])[0], expected)


def test_a_step_of_one_row_starts_few_kernels() -> None:
    gpu = EmulatedGpu()
    decoder = CudaDecoder(model_of(CONFIG), SLOTS, gpu)
    forward(decoder, [Span(0, 0, (1,))])
    before = gpu.launches
    forward(decoder, [Span(0, 1, (1,))])
    # Per layer four products and attention; then the embedding, and the head after its LayerNorm.
    assert gpu.launches - before == 5 * CONFIG.layers + 3


def test_blocks_that_normalise_wide_rows_have_few_of_them() -> None:
    product = Product("up", 3072, 12288, {"norm_weight": 1})
    assert [{each.rows for each in product.sizes(64, wide=wide)} for wide in (False, True)] == [{8}, {8}]


@pytest.mark.parametrize(
    ("changes", "supported"),
    [
        ({}, True),
        ({"context_length": 4096}, True),
        ({"context_length": 4097}, False),
        ({"width": 129, "heads": 1}, False),
        ({"hidden_width": 32769}, False),
        ({"vocabulary_size": 1}, False),
        ({"width": 3075, "heads": 25}, False),
    ],
)
def test_only_shapes_that_the_kernels_take_are_supported(changes: dict[str, Any], supported: bool) -> None:
    assert supports(replace(CONFIG, **changes)) is supported


def test_after_the_warm_up_slots_are_empty() -> None:
    decoder = decoder_for()
    tokens = random_text(CONFIG, 1, 70)
    for _ in decoder.warm_up():
        pass
    assert_logits(forward(decoder, spans_of(1, 0, tokens))[-1], full_forward(model_of(CONFIG), tokens)[-1])


def test_a_decoder_knows_the_memory_of_full_slots_before_they_are_full() -> None:
    gpu = EmulatedGpu()
    decoder = CudaDecoder(model_of(CONFIG), 2, gpu)
    empty = decoder.memory_bytes
    slots = 2 * CONFIG.context_length * decoder.bytes_per_token
    assert slots < empty < gpu.allocated_bytes + 2 * slots
    forward(decoder, [span for slot in (0, 1) for span in spans_of(slot, 0, random_text(CONFIG, slot, 150))])
    assert decoder.memory_bytes == empty
