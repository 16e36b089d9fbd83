"""The promises of both decoders, compared with the plain forward of the model.

Shapes: T tokens, S positions of the context, V vocabulary.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from shared.decoding.decoder import Decoder
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.gpt.config import GPTConfig, count_parameters
from shared.gpt.model import GPT
from tests.decoders import cpu_decoder, cuda_decoder, mlx_decoder
from tests.shared.gpt.random_models import forward, full_forward, models, random_model, random_text, seeds

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
SLOTS = 4
# A context that holds two whole spans and a part of one.
CONFIG = GPTConfig(
    layers=2, width=36, heads=3, hidden_width=50, context_length=150, vocabulary_size=97, tied_head=False
)

MakeDecoder = Callable[[GPT, int], Decoder]
MAKERS: list[MakeDecoder] = [cpu_decoder, mlx_decoder]
both = pytest.mark.parametrize("make", MAKERS, ids=["cpu", "mlx"])
with_together = pytest.mark.parametrize(
    "make", [*MAKERS, partial(mlx_decoder, spans_together=3)], ids=["cpu", "mlx", "mlx-together"]
)


def spans_of(slot: int, start: int, tokens: tuple[int, ...]) -> list[Span]:
    """Returns tokens from a position on, in the spans of a prompt."""
    assert start % SPAN_TOKENS == 0 or len(tokens) == 1
    return [
        Span(slot, start + first, tokens[first : first + SPAN_TOKENS]) for first in range(0, len(tokens), SPAN_TOKENS)
    ]


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


# A token whose numbers are not finite, and the texts without it.
SPOILED = CONFIG.vocabulary_size - 1
SOUND = replace(CONFIG, vocabulary_size=SPOILED)


def spoiled_model() -> GPT:
    """Returns `random_model(CONFIG, 1)` with one token that is not finite."""
    model = random_model(CONFIG, 1)
    model.token_embedding.weight[SPOILED] = mx.nan
    return model


class Slots(RuleBasedStateMachine):
    """A decoder, and the tokens that each of its slots should hold."""

    tolerance = TOLERANCE

    def make(self, model: GPT) -> Decoder:
        raise NotImplementedError

    def find_model(self, data: st.DataObject) -> GPT:
        return data.draw(models(longest_context=150), "model")

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.model = model = self.find_model(data)
        self.context_length = model.config.context_length
        self.decoder = self.make(model)
        self.held: list[tuple[int, ...]] = [()] * SLOTS
        # Tokens that were in a slot, and the blocks that were read from it then.
        self.kept: list[tuple[tuple[int, ...], list[tuple[int, object]]]] = []

    @rule(data=st.data(), seed=seeds, slots=st.lists(st.integers(0, SLOTS - 1), min_size=1, unique=True))
    def read_tokens(self, data: st.DataObject, seed: int, slots: list[int]) -> None:
        spans = []
        for slot in slots:
            start = len(self.held[slot])
            if start == self.context_length:
                start = 0
            most = self.context_length - start if start % SPAN_TOKENS == 0 else 1
            tokens = random_text(self.model.config, seed + slot, data.draw(st.integers(1, most), "tokens"))
            self.held[slot] = self.held[slot][:start] + tokens
            spans += spans_of(slot, start, tokens)
        expected = {slot: full_forward(self.model, self.held[slot]) for slot in slots}
        for span, logits in zip(spans, forward(self.decoder, spans), strict=True):
            assert_close(logits, expected[span.slot][span.start + len(span.tokens) - 1], self.tolerance)

    @rule(data=st.data(), source=st.integers(0, SLOTS - 1), others=st.sets(st.integers(0, SLOTS - 1)))
    def copy(self, data: st.DataObject, source: int, others: set[int]) -> None:
        whole = len(self.held[source])
        length = data.draw(st.just(whole) | st.integers(0, whole), "length")
        others -= {source}
        self.decoder.copy(source, sorted(others), length)
        for target in others:
            self.held[target] = self.held[source][:length]

    @rule(slot=st.integers(0, SLOTS - 1))
    def keep(self, slot: int) -> None:
        tokens = self.held[slot]
        blocks = [
            (start, self.decoder.read(slot, start, min(start + SPAN_TOKENS, len(tokens))))
            for start in range(0, len(tokens), SPAN_TOKENS)
        ]
        self.kept.append((tokens, blocks))

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), slot=st.integers(0, SLOTS - 1))
    def restore(self, data: st.DataObject, slot: int) -> None:
        self.held[slot], blocks = data.draw(st.sampled_from(self.kept), "kept")
        for start, block in blocks:
            self.decoder.write(slot, start, block)

    @rule(slot=st.integers(0, SLOTS - 1))
    def clear(self, slot: int) -> None:
        self.decoder.clear(slot)
        self.held[slot] = ()

    @rule()
    def reset(self) -> None:
        self.decoder.reset()
        self.held = [()] * SLOTS


@with_together
def test_logits_agree_with_a_full_forward_after_any_operations(make: MakeDecoder) -> None:
    class Made(Slots):
        def make(self, model: GPT) -> Decoder:
            return make(model, SLOTS)

    run_state_machine_as_test(Made, settings=settings(max_examples=40, stateful_step_count=15))


@both
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("context_length", [1, 2, 16, 63, 64, 65, 150])
def test_the_whole_context_can_be_filled(make: MakeDecoder, context_length: int, tied: bool) -> None:
    model = random_model(replace(CONFIG, context_length=context_length, tied_head=tied), 1)
    decoder = make(model, 2)
    tokens = random_text(model.config, 2, context_length)
    expected = full_forward(model, tokens)
    for slot in (0, 1):
        assert_close(forward(decoder, spans_of(slot, 0, tokens))[-1], expected[-1])
    # Token by token in one slot, while the other is full and waits or computes its last token again.
    last = Span(1, context_length - 1, tokens[-1:])
    for position, token in enumerate(tokens):
        assert_close(forward(decoder, [Span(0, position, (token,))])[0], expected[position])
        assert_close(forward(decoder, [last])[0], expected[-1])


@with_together
def test_logits_come_in_the_order_of_the_spans(make: MakeDecoder) -> None:
    model = random_model(CONFIG, 1)
    decoder = make(model, SLOTS)
    texts = {slot: random_text(CONFIG, slot, length) for slot, length in ((3, 20), (0, 1), (2, 70), (1, 64))}
    spans = [span for slot, tokens in texts.items() for span in spans_of(slot, 0, tokens)]
    logits = forward(decoder, spans)
    assert len(logits) == len(spans) == 5
    for span, row in zip(spans, logits, strict=True):
        assert row.shape == (97,) and row.dtype == np.float32
        assert_close(row, full_forward(model, texts[span.slot])[span.start + len(span.tokens) - 1])


@both
@pytest.mark.parametrize("length", [1, 63, 64, 70])
def test_slots_get_a_prefix_of_another_slot(make: MakeDecoder, length: int) -> None:
    model = random_model(CONFIG, 1)
    decoder = make(model, SLOTS)
    tokens = random_text(CONFIG, 1, 80)
    expected = full_forward(model, tokens)
    # The targets held fewer and more tokens before, and they wait for a step with other slots.
    for slot, count in ((0, 3), (3, 150)):
        forward(decoder, spans_of(slot, 0, random_text(CONFIG, slot + 2, count)))
    forward(decoder, spans_of(2, 0, tokens[:70]))
    decoder.copy(2, [0, 3], length)
    assert_close(forward(decoder, [Span(2, 70, (tokens[70],))])[0], expected[70])
    for place in range(length, length + 5):
        for logits in forward(decoder, [Span(slot, place, (tokens[place],)) for slot in (0, 3)]):
            assert_close(logits, expected[place])


@both
def test_reading_a_slot_returns_a_copy(make: MakeDecoder) -> None:
    model = random_model(CONFIG, 1)
    decoder = make(model, 2)
    first, second = random_text(CONFIG, 1, 65), random_text(CONFIG, 2, 64)
    expected = forward(decoder, spans_of(0, 0, first))[1]
    block = decoder.read(0, 0, 64)
    forward(decoder, spans_of(0, 0, second))
    decoder.write(1, 0, block)
    forward(decoder, spans_of(1, 0, second))
    decoder.write(0, 0, block)
    assert np.array_equal(forward(decoder, [Span(0, 64, first[64:])])[0], expected)


@with_together
def test_earlier_content_of_a_slot_does_not_change_one_bit(make: MakeDecoder) -> None:
    model = random_model(CONFIG, 1)
    new, used = make(model, 3), make(model, 3)
    for slot in range(3):
        forward(used, spans_of(slot, 0, random_text(CONFIG, slot, 150)))
    tokens = random_text(CONFIG, 9, 90)
    steps = [spans_of(1, 0, tokens[:70]), *([Span(1, place, tokens[place : place + 1])] for place in range(70, 90))]
    for spans in steps:
        assert np.array_equal(forward(new, spans), forward(used, spans))


@with_together
def test_numbers_that_are_not_finite_reach_no_other_slot(make: MakeDecoder) -> None:
    clean, spoiled = make(random_model(CONFIG, 1), 3), make(spoiled_model(), 3)
    texts = [random_text(SOUND, slot, 70) for slot in range(3)]
    for decoder, token in ((clean, 0), (spoiled, SPOILED)):
        forward(decoder, [*spans_of(0, 0, texts[0]), Span(1, 0, (*texts[1][:5], token)), *spans_of(2, 0, texts[2])])
    for step in range(10):
        spans = [Span(0, 70 + step, (3,)), Span(1, 6 + step, (3,)), Span(2, 70 + step, (3,))]
        expected, logits = forward(clean, spans), forward(spoiled, spans)
        assert np.isnan(logits[1]).all()
        assert np.array_equal(logits[0], expected[0])
        assert np.array_equal(logits[2], expected[2])


@with_together
def test_numbers_that_are_not_finite_reach_no_earlier_span(make: MakeDecoder) -> None:
    decoder = make(spoiled_model(), 2)
    tokens = random_text(SOUND, 1, 65)
    expected = full_forward(random_model(CONFIG, 1), tokens)
    sound, spoiled = forward(decoder, spans_of(0, 0, (*tokens[:64], SPOILED, *tokens[:50])))
    assert_close(sound, expected[63])
    assert np.isnan(spoiled).all()
    decoder.write(1, 0, decoder.read(0, 0, 64))
    assert_close(forward(decoder, [Span(1, 64, tokens[64:])])[0], expected[64])


@with_together
@pytest.mark.parametrize("forget", [lambda decoder: decoder.clear(1), lambda decoder: decoder.reset()])
def test_a_slot_is_clean_for_its_next_sequence(make: MakeDecoder, forget: Callable[[Decoder], None]) -> None:
    decoder = make(spoiled_model(), 2)
    for logits in forward(decoder, spans_of(1, 0, (1, *[SPOILED] * 149))):
        assert np.isnan(logits).all()
    forget(decoder)
    tokens = random_text(SOUND, 1, 66)
    expected = full_forward(random_model(CONFIG, 1), tokens)
    assert_close(forward(decoder, spans_of(1, 0, tokens[:65]))[-1], expected[64])
    assert_close(forward(decoder, [Span(1, 65, tokens[65:])])[0], expected[65])


@both
def test_nothing_is_dropped(make: MakeDecoder) -> None:
    config = replace(CONFIG, context_length=20, dropout=0.5)
    model = random_model(config, 1)
    tokens = random_text(config, 1, 20)
    assert_close(forward(make(model, 2), [Span(0, 0, tokens)])[0], full_forward(model, tokens)[-1])


@both
@pytest.mark.parametrize("lengths", [[64, 64, 21], [16] * 9 + [5], [64, *[16] * 4, 21], [*[16] * 4, 64, 16, 5]])
def test_scores_agree_with_the_plain_loss_in_any_chunks(make: MakeDecoder, lengths: list[int]) -> None:
    model = random_model(CONFIG, 1)
    decoder = make(model, SLOTS)
    tokens = random_text(CONFIG, 3, 150)
    # Earlier content of the slot does not matter.
    forward(decoder, spans_of(2, 0, random_text(CONFIG, 4, 100)))
    losses: list[float] = []
    for length in lengths:
        start = len(losses)
        losses += decoder.score(Span(2, start, tokens[start : start + length]), tokens[start + 1 : start + 1 + length])
    logits = full_forward(model, tokens[:-1]).astype(np.float64)
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(149), tokens[1:]]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=TOLERANCE)
    # The slot can decode further.
    assert_close(forward(decoder, [Span(2, 149, tokens[149:])])[0], full_forward(model, tokens)[149])


@with_together
@pytest.mark.parametrize("count", [1, 2, 64, 65, 149])
def test_the_logits_after_every_token_are_those_of_single_spans(make: MakeDecoder, count: int) -> None:
    model = random_model(CONFIG, 3)
    tokens = random_text(CONFIG, 2, count)
    decoder = make(model, SLOTS)
    every: list[np.ndarray] = []
    last: Any = None
    for span in spans_of(1, 0, tokens):
        rows, last = decoder.logits(span)
        every.append(np.array(rows))
    assert_close(np.concatenate(every), full_forward(model, tokens))
    # The slot and the last logits go on as after `forward`.
    (expected,) = [decoder.forward([span])[0] for span in spans_of(2, 0, tokens)][-1:]
    np.testing.assert_allclose(np.asarray(last), np.asarray(expected), rtol=0, atol=TOLERANCE)
    after = decoder.forward([Span(1, count, (5,)), Span(2, count, (5,))])
    assert_close(np.asarray(after[0]), np.asarray(after[1]))
    (drawn,) = decoder.draw([TemperatureSampling(last, 0.0, seed=0, position=0, masked=None)])
    assert drawn == int(np.argmax(np.asarray(last)))


@with_together
def test_a_score_is_not_finite_if_a_logit_is_not(make: MakeDecoder) -> None:
    decoder = make(spoiled_model(), SLOTS)
    assert np.isnan(decoder.score(Span(0, 0, (1, SPOILED, 2)), (2, 3, 4)))[1:].all()


every = pytest.mark.parametrize("make", [*MAKERS, cuda_decoder], ids=["cpu", "mlx", "cuda"])


@every
def test_tokens_in_a_row_are_those_of_single_steps(make: MakeDecoder) -> None:
    """With masks that end, temperatures, a full context and logits that are not finite, in some of the slots."""
    model = spoiled_model()
    in_a_row, single = make(model, 5), make(model, 5)
    texts = {0: 70, 1: 5, 2: 147, 3: 60, 4: 1}
    for decoder in (in_a_row, single):
        forward(
            decoder,
            [span for slot, count in texts.items() for span in spans_of(slot, 0, random_text(SOUND, slot, count))],
        )
    rows = [
        DecodeRow(0, 70, 3, 0.7, seed=1, drawn=4, masked=0, masked_draws=0),
        DecodeRow(1, 5, 4, 0.0, seed=2, drawn=0, masked=0, masked_draws=0),
        DecodeRow(2, 147, 5, 1.0, seed=2**63 + 5, drawn=9, masked=8, masked_draws=2),
        DecodeRow(3, 60, 6, 30.0, seed=-7, drawn=2**40, masked=SPOILED, masked_draws=10**9),
        DecodeRow(4, 1, SPOILED, 1.0, seed=0, drawn=0, masked=0, masked_draws=0),
    ]
    found = in_a_row.decode(rows, MAX_DECODE_STEPS)
    for row, tokens in zip(rows, found, strict=True):
        last, expected = row.token, list[int | None]()
        for step in range(MAX_DECODE_STEPS):
            if row.start + step == CONFIG.context_length or (expected and expected[-1] is None):
                break
            (logits,) = single.forward([Span(row.slot, row.start + step, (last,))])
            masked = row.masked if step < row.masked_draws else None
            (token,) = single.draw([TemperatureSampling(logits, row.temperature, row.seed, row.drawn + step, masked)])
            expected.append(token)
            last = 0 if token is None else token
        assert tokens == expected
    assert [len(tokens) for tokens in found] == [MAX_DECODE_STEPS, MAX_DECODE_STEPS, 3, MAX_DECODE_STEPS, 1]
    assert found[4] == [None] and SPOILED not in found[3]
    # The slots go on after what was computed.
    after = rows[0]._replace(start=78, token=found[0][-1] or 0, drawn=12)
    (logits,) = single.forward([Span(0, 78, (after.token,))])
    assert in_a_row.decode([after], 1) == [single.draw([after.draw(logits, 0)])]


@both
def test_a_decoder_knows_its_memory(make: MakeDecoder) -> None:
    model = random_model(CONFIG, 1)
    decoder = make(model, SLOTS)
    weights = count_parameters(CONFIG).total * 4
    slots = SLOTS * CONFIG.context_length * decoder.bytes_per_token
    assert weights + slots <= decoder.memory_bytes < 2 * (weights + slots)


@both
def test_a_decoder_can_be_created_on_another_thread(make: MakeDecoder) -> None:
    with ThreadPoolExecutor(1) as thread:
        model, decoder = thread.submit(lambda: (model := random_model(CONFIG, 5), make(model, 2))).result()
    tokens = random_text(CONFIG, 1, 70)
    for _ in decoder.warm_up():
        pass
    assert_close(forward(decoder, spans_of(1, 0, tokens))[-1], full_forward(model, tokens)[-1])


@both
def test_a_token_takes_its_keys_and_values_in_each_layer(make: MakeDecoder) -> None:
    assert make(random_model(CONFIG, 1), 3).bytes_per_token == 2 * CONFIG.layers * CONFIG.width * 4
