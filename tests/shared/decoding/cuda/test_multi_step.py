"""Several tokens in a row on an NVIDIA GPU, or on an emulation of one."""

from dataclasses import replace

import numpy as np
import pytest

from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.cuda.program import Row
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.device.cuda_driver import CudaError
from tests.decoders import make_gpu
from tests.shared.decoding.cuda.models import decoder_for, model_of
from tests.shared.decoding.test_decoders import CONFIG, SPOILED, spans_of, spoiled_model
from tests.shared.gpt.random_models import forward, random_text

pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize("eager", [False, True])
def test_what_was_begun_before_it_was_asked_for_is_the_same(eager: bool) -> None:
    """Rows end, go on alone, or reach the end of their context; the caller changes its mind, or computes a prompt.

    The GPU may be done with the next batch before the caller looks at the last one.
    """
    ahead, plain = decoder_for(slots=5, eager=eager), decoder_for(slots=5)
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
    # One has reached the end of its context, another ends, and those that are left come in another order.
    assert len(rows) == 4
    del rows[1]
    rows.reverse()
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


def test_a_row_at_the_end_of_its_context_writes_nothing_more() -> None:
    config = replace(CONFIG, context_length=2 * SPAN_TOKENS)
    decoder = decoder_for(config, slots=2)
    tokens = random_text(config, 1, 126)
    forward(decoder, [*spans_of(0, 0, tokens), *spans_of(1, 0, tokens)])
    expected = forward(decoder, [Span(1, 126, (1,))])
    row = DecodeRow(0, 126, 1, 1.0, seed=0, drawn=0, masked=0, masked_draws=0)
    # Nor in what the GPU does ahead.
    assert [len(drawn) for drawn in decoder.decode([row], MAX_DECODE_STEPS, MAX_DECODE_STEPS)] == [2]
    assert np.array_equal(forward(decoder, [Span(1, 126, (1,))]), expected)


def test_rows_that_have_ended_are_computed_no_further() -> None:
    decoder = decoder_for(slots=5)
    rows = [DecodeRow(slot, 0, slot, 1.0, seed=slot, drawn=0, masked=3, masked_draws=0) for slot in range(5)]
    for _ in range(2 * SPAN_TOKENS // MAX_DECODE_STEPS):
        tokens = decoder.decode(rows, MAX_DECODE_STEPS, MAX_DECODE_STEPS)
        # From now on only the first one goes on.
        rows = [rows[0]._replace(start=rows[0].start + MAX_DECODE_STEPS, token=tokens[0][-1] or 0)]
    assert [sum(page is not None for page in slot) for slot in decoder._slots] == [3, 1, 1, 1, 1]


def test_a_row_that_drew_no_token_is_computed_no_further() -> None:
    """Its slot is cleared although the GPU has begun with its next tokens."""
    gpu = make_gpu()
    decoder, alone = CudaDecoder(spoiled_model(), 2, gpu), decoder_for(slots=2)
    first = DecodeRow(0, 0, 0, 1.0, seed=0, drawn=0, masked=SPOILED, masked_draws=1000)
    for seed in range(100):
        second = DecodeRow(1, 0, 1, 1.0, seed, drawn=0, masked=3, masked_draws=0)
        (sound,) = alone.decode([second], MAX_DECODE_STEPS)
        # The logits after it are not finite, and are drawn from in the same call.
        if SPOILED in sound[:-1]:
            break
    else:
        pytest.fail("No seed draws the spoiled token.")
    tokens, ended = decoder.decode([first, second], MAX_DECODE_STEPS, MAX_DECODE_STEPS)
    assert ended == [*sound[: sound.index(SPOILED) + 1], None]
    rows = gpu.host_memory(2 * Row.itemsize).view(Row)
    gpu.read(decoder._steps._memory["rows"], rows.view(np.uint8))
    gpu.wait()
    assert rows["slot"].tolist() == [0, -1]
    decoder.clear(1)
    assert alone.decode([first], MAX_DECODE_STEPS, MAX_DECODE_STEPS) == [tokens]
    for _ in range(9):
        first = first._replace(start=first.start + MAX_DECODE_STEPS, token=tokens[-1] or 0)
        (tokens,) = decoder.decode([first], MAX_DECODE_STEPS, MAX_DECODE_STEPS)
        assert alone.decode([first], MAX_DECODE_STEPS, MAX_DECODE_STEPS) == [tokens]
    assert decoder._slots[1] == [None] * len(decoder._slots[1])


def test_after_a_launch_failed_the_memory_of_what_had_begun_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = make_gpu()
    decoder, alone = CudaDecoder(model_of(CONFIG), 2, gpu), decoder_for(slots=2)
    row = DecodeRow(0, 0, 1, 1.0, seed=1, drawn=0, masked=3, masked_draws=0)
    decoder.decode([row], 1)
    replayed = list[object]()

    def fail_later(graph: object) -> None:
        if len(replayed) == 2:
            raise CudaError("no more launches")
        replayed.append(graph)
        replay(graph)

    replay, used = gpu.replay, decoder._steps._host[0]
    with monkeypatch.context() as patched, pytest.raises(CudaError, match="no more launches"):
        patched.setattr(gpu, "replay", fail_later)
        decoder.decode([row], 3)
    assert decoder._steps._host[0] is not used
    decoder.reset()
    other = row._replace(slot=1, token=5)
    assert decoder.decode([other], 8) == alone.decode([other], 8)
    assert decoder.decode([row], 3) == alone.decode([row], 3)


def test_as_many_rows_go_on_as_a_block_has_threads() -> None:
    config = replace(CONFIG, layers=1, width=12, heads=1, hidden_width=12, vocabulary_size=20)
    decoder, alone = decoder_for(config, slots=520), decoder_for(config, slots=2)
    rows = [DecodeRow(slot, 0, slot % 20, 1.0, seed=slot, drawn=0, masked=3, masked_draws=0) for slot in range(520)]
    first = decoder.decode(rows, 1, 1)
    rows = [row._replace(start=1, drawn=1, token=tokens[0] or 0) for row, tokens in zip(rows, first, strict=True)]
    second = decoder.decode(rows, 1)
    for slot in (0, 255, 511, 519):
        row = DecodeRow(0, 0, slot % 20, 1.0, seed=slot, drawn=0, masked=3, masked_draws=0)
        assert alone.decode([row], 2) == [first[slot] + second[slot]]


def test_what_was_begun_for_a_slot_does_not_reach_its_next_sequence() -> None:
    decoder, alone = decoder_for(slots=2), decoder_for(slots=2)
    row = DecodeRow(0, 0, 1, 1.0, seed=1, drawn=0, masked=3, masked_draws=0)
    decoder.decode([row], MAX_DECODE_STEPS, MAX_DECODE_STEPS)
    # It begins where the GPU has gone on.
    prompt = spans_of(0, 0, random_text(CONFIG, 5, MAX_DECODE_STEPS))
    forward(decoder, prompt)
    forward(alone, prompt)
    row = row._replace(start=MAX_DECODE_STEPS, token=7, seed=9)
    assert decoder.decode([row], MAX_DECODE_STEPS) == alone.decode([row], MAX_DECODE_STEPS)
