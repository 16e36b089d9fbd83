"""Streams on a decoder that draws several tokens in a row: the same as one token at a time."""

from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import pytest

from inference_service.engine.request import Delta, Failed, GenerationRequest, NotFinite
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.multi_step import MAX_DECODE_STEPS, DecodeRow
from shared.decoding.sampling import SamplingParameters
from shared.decoding.weight_format import WeightFormat
from shared.gpt.model import GPT
from tests.decoders import cpu_library, make_gpu
from tests.fakes import tiny_model
from tests.inference_service.engine.harness import SLOTS, Harness, request


class CountsSteps:
    """Of a decoder: draws several tokens in a row, and keeps their numbers."""

    # A plain attribute, so that a test can set it.
    max_decode_steps = MAX_DECODE_STEPS
    steps: list[int]

    def decode(self, rows: Sequence[DecodeRow], steps: int, next_steps: int = 0) -> list[list[int | None]]:
        self.steps.append(steps)
        drawn: list[list[int | None]] = super().decode(rows, steps, next_steps)  # type: ignore[misc]
        return drawn


class OnCpu(CountsSteps, CpuDecoder):
    def __init__(self, model: GPT) -> None:
        super().__init__(model, SLOTS, 1, cpu_library(), WeightFormat.FP32)
        self.steps = []


class OnGpu(CountsSteps, CudaDecoder):
    """It begins with tokens before the engine asks for them."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model, SLOTS, make_gpu())
        self.steps = []


MultiStep = OnCpu | OnGpu
MakeMultiStep = Callable[[GPT], MultiStep]


@pytest.fixture(params=[OnCpu, pytest.param(OnGpu, marks=pytest.mark.slow)])
def make(request: pytest.FixtureRequest) -> MakeMultiStep:
    made: MakeMultiStep = request.param
    return made


@pytest.fixture
def decoder(make: MakeMultiStep) -> MultiStep:
    return make(tiny_model(0))


@pytest.fixture
def multi_step(decoder: MultiStep) -> Iterator[Harness]:
    harness = Harness()
    harness.add_model(1, tiny_model(0), decoder)
    yield harness
    harness.engine.stop()


@pytest.fixture
def single_step(make: MakeMultiStep, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    harness, decoder = Harness(), make(tiny_model(0))
    monkeypatch.setattr(decoder, "max_decode_steps", 1)
    harness.add_model(1, tiny_model(0), decoder)
    yield harness
    harness.engine.stop()


def some_requests() -> list[GenerationRequest]:
    """Returns requests that end for each reason, and some that need the engine between two tokens."""
    return [
        request("greedy", max_tokens=21, sampling=SamplingParameters(temperature=0.0)),
        request("warm", max_tokens=6, seed=3),
        request("ending", max_tokens=60, ignore_eos=False, min_tokens=11, seed=5),
        request("stop", max_tokens=60, stop=("e", "t", "a"), seed=6),
        request("context", "x" * 70, max_tokens=500),
        request("biased", max_tokens=13, sampling=SamplingParameters(temperature=1.0, frequency_penalty=1.0)),
        request("measured", max_tokens=13, logprobs=1),
        request("last", max_tokens=40, seed=9),
    ]


def test_streams_are_those_of_single_steps(multi_step: Harness, decoder: MultiStep, single_step: Harness) -> None:
    expected = [single_step.generate(one)[0] for one in some_requests()]
    # Alone, and together in slots that others leave.
    for found in ([multi_step.generate(one)[0] for one in some_requests()], multi_step.generate(*some_requests())):
        for one, other in zip(found, expected, strict=True):
            assert (one.tokens, one.text) == (other.tokens, other.text)
            assert (one.finished.reason, one.finished.matched_stop) == (
                other.finished.reason,
                other.finished.matched_stop,
            )
            assert one.finished.generated_tokens == len(one.draws)
    assert min(decoder.steps) < MAX_DECODE_STEPS == max(decoder.steps)


def test_several_tokens_come_in_one_event_with_their_times(multi_step: Harness) -> None:
    (one,) = multi_step.generate(request("a", max_tokens=20))
    deltas = [event for event in one.events if isinstance(event, Delta)]
    assert [len(delta.draws) for delta in deltas] == [1, MAX_DECODE_STEPS, MAX_DECODE_STEPS, 19 - 2 * MAX_DECODE_STEPS]
    assert all(len(delta.times) == len(delta.draws) for delta in deltas)


def test_a_single_token_that_is_left_is_not_computed_twice(multi_step: Harness, decoder: MultiStep) -> None:
    """The decoder may have begun with it."""
    decoder.steps.clear()
    multi_step.generate(request("a", max_tokens=2 + MAX_DECODE_STEPS))
    assert decoder.steps == [MAX_DECODE_STEPS, 1]


def test_a_stream_whose_numbers_are_not_finite_ends_after_its_last_sound_token(
    make: MakeMultiStep, single_step: Harness
) -> None:
    model = tiny_model(0)
    (sound,) = single_step.generate(request("sound", max_tokens=20))
    # The fifth token that the stream draws spoils what comes after it.
    spoiling = sound.tokens[4]
    assert spoiling not in sound.tokens[:4]
    model.token_embedding.weight[spoiling] = mx.nan
    spoiled = Harness()
    decoder = make(model)
    spoiled.add_model(1, model, decoder)
    try:
        spoiled.submit(request("sound", max_tokens=20))
        result = spoiled.wait("sound")
        assert result.tokens == sound.tokens[:5]
        assert isinstance(result.events[-1], Failed) and isinstance(result.events[-1].error, NotFinite)
        assert decoder.steps[-1] == MAX_DECODE_STEPS
    finally:
        spoiled.engine.stop()
