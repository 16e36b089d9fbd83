"""Further promises of the programs for a GPU, which MLX can also run on a CPU."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.decoding.mlx_decoder import MlxDecoder, ProgramCache
from shared.decoding.sampling import TemperatureSampling
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.gpt.config import GPTConfig
from shared.gpt.operations import on_cpu
from tests.shared.gpt.random_models import forward, full_forward, random_model, random_text, seeds

pytestmark = pytest.mark.slow

CONFIG = GPTConfig(
    layers=2, width=36, heads=3, hidden_width=50, context_length=150, vocabulary_size=97, tied_head=False
)
SLOTS = 4


def prefill(decoder: MlxDecoder, slot: int, tokens: tuple[int, ...]) -> np.ndarray:
    """Returns the logits after tokens that a slot computes from its start."""
    starts = range(0, len(tokens), SPAN_TOKENS)
    return forward(decoder, [Span(slot, start, tokens[start : start + SPAN_TOKENS]) for start in starts])[-1]


def warm_up(decoder: MlxDecoder) -> None:
    for _ in decoder.warm_up():
        pass


@pytest.mark.parametrize(("together", "width"), [(1, 30), (3, 33)])
@pytest.mark.parametrize("context_length", [1, 2, 15, 16, 17, 64, 70, 131])
def test_the_warm_up_compiles_programs_for_all_spans(context_length: int, together: int, width: int) -> None:
    config = replace(CONFIG, width=width, context_length=context_length)
    programs = ProgramCache()
    decoder = MlxDecoder(random_model(config, 1), SLOTS, programs, together)
    warm_up(decoder)
    count = programs.compiled_shapes
    assert count > 0
    for length in range(1, min(context_length, SPAN_TOKENS) + 1):
        for start in range(0, context_length - length + 1, SPAN_TOKENS):
            spans = [Span((length + number) % SLOTS, start, (1,) * length) for number in range(1 + length % SLOTS)]
            row = decoder.forward(spans)[-1]
            decoder.draw([TemperatureSampling(row, 1.0, seed=1, position=0, masked=None)] * (length % 5))
            decoder.score(Span((length + 1) % SLOTS, start, (1,) * length), (2,) * length)
    for position in range(context_length):
        rows = decoder.forward([Span(slot, position, (2,)) for slot in range(1 + position % SLOTS)])
        decoder.draw([TemperatureSampling(row, 0.0, seed=1, position=0, masked=3) for row in rows])
    decoder.copy(0, [1, 2], context_length)
    decoder.write(3, 0, decoder.read(0, 0, context_length))
    decoder.clear(0)
    decoder.reset()
    forward(decoder, [Span(0, 0, (3,))])
    assert programs.compiled_shapes == count


def test_another_version_of_the_same_shape_compiles_nothing_and_has_its_own_weights() -> None:
    config = replace(CONFIG, width=42, context_length=70)
    tokens = random_text(config, 1, 70)
    first, second = random_model(config, 1), random_model(config, 2)
    programs = ProgramCache()
    decoder = MlxDecoder(first, SLOTS, programs)
    warm_up(decoder)
    count = programs.compiled_shapes
    other = MlxDecoder(second, SLOTS, programs)
    warm_up(other)
    # In turns, like two versions during a swap.
    for _ in range(2):
        for model, mine in ((first, decoder), (second, other)):
            expected = full_forward(model, tokens)
            np.testing.assert_allclose(prefill(mine, 0, tokens[:65]), expected[64], rtol=0, atol=1e-5)
            np.testing.assert_allclose(forward(mine, [Span(0, 65, tokens[65:66])])[0], expected[65], rtol=0, atol=1e-5)
    assert programs.compiled_shapes == count


def test_another_number_of_slots_is_another_shape() -> None:
    config = replace(CONFIG, width=48, context_length=20)
    model, programs = random_model(config, 1), ProgramCache()
    first, second = MlxDecoder(model, 2, programs), MlxDecoder(model, 3, programs)
    warm_up(first)
    count = programs.compiled_shapes
    warm_up(second)
    assert programs.compiled_shapes > count


# On a CPU, a row gets other last digits in another place of a product, so spans are not computed together there.
TOGETHER = pytest.param(
    replace(CONFIG, width=384, heads=8, hidden_width=1536),
    8,
    marks=pytest.mark.skipif(on_cpu(), reason="There is no GPU."),
)


@pytest.mark.parametrize(("config", "together"), [(CONFIG, 1), TOGETHER])
@settings(max_examples=20)
@given(st.integers(0, SLOTS - 1), st.integers(1, 100), st.data())
def test_neighbours_do_not_change_one_bit(
    config: GPTConfig, together: int, slot: int, length: int, data: st.DataObject
) -> None:
    """A prompt and ten tokens, alone and beside slots that are prefilled, decoded, copied and cleared."""
    model = random_model(config, 1)
    alone, among = (MlxDecoder(model, SLOTS, ProgramCache(), together) for _ in range(2))
    tokens = random_text(config, length, length + 10)
    others = [other for other in range(SLOTS) if other != slot]
    filled = dict.fromkeys(others, 0)

    def neighbours() -> list[Span]:
        """Returns the spans of other slots in the same step, after operations on those slots between two steps."""
        for other in data.draw(st.sets(st.sampled_from(others)), "copied"):
            among.copy(slot, [other], 16)
            filled[other] = 16
        for other in data.draw(st.sets(st.sampled_from(others)), "cleared"):
            among.clear(other)
            filled[other] = 0
        spans = []
        for other in data.draw(st.lists(st.sampled_from(others), unique=True), "read"):
            count = data.draw(st.integers(1, 64), "count") if filled[other] == 0 else 1
            spans.append(Span(other, filled[other], random_text(config, data.draw(seeds, "seed"), count)))
            filled[other] += count
        return spans

    spans = [Span(slot, start, tokens[start : min(start + 64, length)]) for start in range(0, length, 64)]
    spans += [Span(slot, place, tokens[place : place + 1]) for place in range(length, length + 10)]
    for span in spans:
        (expected,) = forward(alone, [span])
        beside = neighbours()
        place = data.draw(st.integers(0, len(beside)), "place")
        assert np.array_equal(forward(among, [*beside[:place], span, *beside[place:]])[place], expected)


@pytest.mark.parametrize(("config", "together"), [TOGETHER])
def test_the_number_of_steps_for_a_prompt_does_not_change_one_bit(config: GPTConfig, together: int) -> None:
    decoder = MlxDecoder(random_model(config, 1), SLOTS, ProgramCache(), together)
    tokens = random_text(config, 1, 140)
    spans = [Span(0, start, tokens[start : start + SPAN_TOKENS]) for start in range(0, 140, SPAN_TOKENS)]
    at_once = forward(decoder, spans)
    other = [forward(decoder, [replace(span, slot=1)])[0] for span in spans]
    assert np.array_equal(at_once, other)
    after = forward(decoder, [Span(slot, 140, (3,)) for slot in (0, 1)])
    assert np.array_equal(after[0], after[1])


def test_a_block_written_back_does_not_change_one_bit() -> None:
    decoder = MlxDecoder(random_model(CONFIG, 1), SLOTS, ProgramCache())
    tokens = random_text(CONFIG, 1, 90)
    prefill(decoder, 2, tokens[:70])
    blocks = [(0, decoder.read(2, 0, 64)), (64, decoder.read(2, 64, 70))]
    expected = [forward(decoder, [Span(2, place, tokens[place : place + 1])])[0] for place in range(70, 90)]
    decoder.reset()
    for start, block in blocks:
        decoder.write(2, start, block)
    for place, logits in enumerate(expected, 70):
        assert np.array_equal(forward(decoder, [Span(2, place, tokens[place : place + 1])])[0], logits)


@pytest.mark.parametrize("together", [1, 3])
def test_a_step_of_many_spans_copies_no_cache(together: int) -> None:
    config = replace(CONFIG, width=54, context_length=128)
    slots = 256
    decoder = MlxDecoder(random_model(config, 1), slots, ProgramCache(), together)
    warm_up(decoder)
    one_layers_keys = slots * config.context_length * decoder.bytes_per_token // config.layers // 2
    reading = [Span(slot, 0, random_text(config, slot, 64)) for slot in range(8)]
    decoding = [Span(slot, 0, (1,)) for slot in range(8, 16)]

    def peak(spans: list[Span]) -> int:
        for _ in range(2):
            mx.reset_peak_memory()
            forward(decoder, spans)
        return mx.get_peak_memory()

    alone = max(peak(reading[:together]), peak(decoding))
    assert peak([*reading, *decoding]) < alone + one_layers_keys / 2
