"""The decoder for NVIDIA GPUs, compared with the plain forward of the model: in bf16, so up to its rounding.

Without such a GPU the same kernels run in an emulation.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from shared.decoding.cuda import steps
from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.cuda.steps import supports
from shared.decoding.decoder import Decoder
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.device.cuda_driver import CudaError
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.decoders import cuda_decoder
from tests.emulated_gpu import EmulatedGpu
from tests.shared.decoding.test_decoders import (
    CONFIG,
    SLOTS,
    SOUND,
    SPOILED,
    Slots,
    assert_close,
    spans_of,
    spoiled_model,
)
from tests.shared.decoding.test_draws import assert_draws_follow_the_distribution, decoder_of, draws
from tests.shared.gpt.random_models import forward, full_forward, random_model, random_text

pytestmark = pytest.mark.slow

# Logits of a few units; those of a wide model are larger.
TOLERANCE = 0.08
# Widths of whole groups of 32, of a part of one, and above the width up to which a product computes its own LayerNorm.
SHAPES = [
    replace(CONFIG, width=64, heads=1, hidden_width=96),
    replace(CONFIG, width=260, heads=4, hidden_width=1030, layers=1, tied_head=True, vocabulary_size=65),
    replace(CONFIG, width=1056, heads=11, hidden_width=40, layers=1),
]


@cache
def model_of(config: GPTConfig) -> GPT:
    return random_model(config, 1)


def decoder_for(config: GPTConfig = CONFIG, slots: int = SLOTS) -> CudaDecoder:
    return cuda_decoder(model_of(config), slots)


def assert_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert_close(actual, expected, max(TOLERANCE, 0.01 * float(np.abs(expected).max())))


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


@pytest.mark.parametrize("count", [9, 33])
def test_any_number_of_rows_draws_several_tokens(count: int) -> None:
    """Also after a call that needed more memory for logits, to which no graph from before may write."""
    decoder, alone = decoder_for(slots=count), decoder_for(slots=2)
    rows = [DecodeRow(slot, 0, slot, 1.0, seed=slot, drawn=0, masked=3, masked_draws=2) for slot in range(count)]
    few = decoder.decode(rows[:2], MAX_DECODE_STEPS)
    found = decoder.decode(rows, MAX_DECODE_STEPS)
    for row, tokens in zip(rows, found, strict=True):
        assert [tokens] == alone.decode([row._replace(slot=0)], MAX_DECODE_STEPS)
    wanted = SPAN_TOKENS + 1
    forward(decoder, [Span(0, place, (1,)) for place in range(wanted)])
    assert decoder.decode(rows[:2], MAX_DECODE_STEPS) == few == found[:2]


def test_what_was_begun_before_it_was_asked_for_is_the_same() -> None:
    """Rows end, go on alone, or reach the end of their context; the caller changes its mind, or computes a prompt."""
    ahead, plain = decoder_for(slots=5), decoder_for(slots=5)
    starts = [1, 60, 130, 5, 0]
    for decoder in (ahead, plain):
        forward(
            decoder, [span for slot in range(4) for span in spans_of(slot, 0, random_text(CONFIG, slot, starts[slot]))]
        )
    rows = [
        DecodeRow(slot, starts[slot], slot, 0.8, seed=slot, drawn=slot, masked=3, masked_draws=11) for slot in range(5)
    ]

    def decode(steps: int, next_steps: int) -> None:
        found = ahead.decode(rows, steps, next_steps)
        assert found == plain.decode(rows, steps)
        rows[:] = [
            row._replace(
                start=row.start + steps,
                token=tokens[-1] or 0,
                drawn=row.drawn + steps,
                masked_draws=max(row.masked_draws - steps, 0),
            )
            for row, tokens in zip(rows, found, strict=True)
            if len(tokens) == steps
        ]

    decode(8, 8)
    decode(8, 8)
    assert len(rows) == 5
    decode(8, 8)
    # The context of one has ended, and another ends meanwhile.
    assert len(rows) == 4
    del rows[1]
    decode(8, 8)
    # Fewer than were begun, and then others.
    decode(3, 0)
    decode(8, 5)
    decode(8, 8)
    for decoder in (ahead, plain):
        forward(decoder, spans_of(1, 0, random_text(CONFIG, 7, 70)))
    rows.append(DecodeRow(1, 70, 9, 0.8, seed=9, drawn=0, masked=3, masked_draws=0))
    decode(8, 8)
    ahead.reset()
    plain.reset()
    rows[:] = [DecodeRow(slot, 0, 1, 0.8, seed=9, drawn=0, masked=3, masked_draws=0) for slot in range(2)]
    decode(8, 8)
    decode(8, 0)


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


def test_a_row_at_the_end_of_its_context_writes_nothing_more() -> None:
    config = replace(CONFIG, context_length=2 * SPAN_TOKENS)
    decoder = decoder_for(config, slots=2)
    tokens = random_text(config, 1, 126)
    forward(decoder, [*spans_of(0, 0, tokens), *spans_of(1, 0, tokens)])
    expected = forward(decoder, [Span(1, 126, (1,))])
    row = DecodeRow(0, 126, 1, 1.0, seed=0, drawn=0, masked=0, masked_draws=0)
    assert [len(drawn) for drawn in decoder.decode([row], MAX_DECODE_STEPS)] == [2]
    assert np.array_equal(forward(decoder, [Span(1, 126, (1,))]), expected)


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


def test_scores_are_the_losses_of_the_next_tokens() -> None:
    decoder = decoder_for()
    tokens = random_text(CONFIG, 3, 90)
    losses = [
        loss
        for span in spans_of(2, 0, tokens[:-1])
        for loss in decoder.score(span, tokens[span.start + 1 :][: len(span.tokens)])
    ]
    logits = full_forward(model_of(CONFIG), tokens[:-1]).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(89), tokens[1:]]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=TOLERANCE)


def test_the_logits_after_a_prompt_stay_while_others_are_computed() -> None:
    decoder = decoder_for(slots=20)
    last = [decoder.logits(Span(slot, 0, random_text(CONFIG, slot, 3)))[1] for slot in range(10)]
    held = [np.array(row) for row in last]
    forward(decoder, [Span(slot, 0, (1,)) for slot in range(10, 20)])
    rows = [*decoder.forward([Span(slot, 1, (2,)) for slot in range(10, 20)]), *last]
    assert np.array_equal([np.array(row) for row in last], held)
    drawn = decoder.draw([TemperatureSampling(row, 0.0, 0, 0, None) for row in rows])
    assert drawn == [int(np.array(row).argmax()) for row in rows]


@pytest.mark.parametrize("vocabulary_size", [2, 97, 1025])
@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.3, 100.0])
def test_a_draw_follows_the_exact_distribution(vocabulary_size: int, temperature: float) -> None:
    decoder = decoder_for(replace(CONFIG, layers=1, vocabulary_size=vocabulary_size))
    rows = decoder.forward([Span(2, 0, (1, 0, 1)), Span(1, 0, (1,))])
    assert_draws_follow_the_distribution(decoder, rows, temperature)


def test_temperature_zero_takes_the_first_of_equally_likely_tokens() -> None:
    decoder = decoder_of(cuda_decoder, [0.0, 3.0, -1.0, 3.0, 3.0])
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert decoder.draw([*draws(row, 0.0), *draws(row, 0.0, masked=1), *draws(row, 0.0, masked=3)]) == [1, 3, 1]
    assert set(decoder.draw(draws(row, 1e-45, count=20))) == {1, 3, 4}


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_interval_draw_the_first_and_the_last_possible_token(
    number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.decoding.cuda.decoder.uniforms", lambda seeds, positions: np.full(len(seeds), number))
    # Only tokens 5 to 2493 and 2500 are possible, the last masked.
    logits = np.full(3000, -1000.0)
    logits[5:2494] = np.sin(np.arange(2489))
    logits[2500] = 0.0
    decoder = decoder_of(cuda_decoder, logits.tolist())
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert decoder.draw(draws(row, 1.0, masked=2500)) == [2493 if number else 5]


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_logits_that_are_not_finite_draw_nothing(value: float) -> None:
    decoder = decoder_of(cuda_decoder, [*[0.0] * 50, value, *[0.0] * 46])
    (row,) = decoder.forward([Span(1, 0, (1,))])
    assert decoder.draw([*draws(row, 0.0), *draws(row, 1.0), *draws(row, 1.0, masked=50)]) == [None] * 3


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
