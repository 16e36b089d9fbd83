"""Streams, samples and versions that run together."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from inference_service.engine.request import Admitted, Delta, Event, Finished
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.spans import SCORED_TOKENS, Span
from shared.decoding.weight_format import WeightFormat
from tests.decoders import cpu_decoder, cpu_library
from tests.fakes import byte_tokenizer, loss_of, tiny_model
from tests.inference_service.engine.harness import SLOTS, Harness, break_forward, request
from tests.waiting import HANG_S


def test_streams_together_equal_each_stream_alone(harness: Harness) -> None:
    prompts = ["Once", "x" * 70, "The dog", "A", "Then they", "z" * 30]
    together = harness.generate(*(request(f"t{i}", prompt, seed=i) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        (alone,) = harness.generate(request(f"a{i}", prompt, seed=i))
        assert together[i].tokens == alone.tokens
        assert together[i].text == alone.text


def test_a_stream_that_joins_others_equals_the_same_stream_alone(harness: Harness) -> None:
    long = "x" * 80
    (alone,) = harness.generate(request("alone", long, max_tokens=10))
    endless = [request(f"e{i}", long[:70], max_tokens=20) for i in range(SLOTS - 1)]
    harness.submit(*endless)
    for one in endless:
        harness.wait(one.id, Delta)
    (joined,) = harness.generate(request("joined", long, max_tokens=10))
    assert joined.tokens == alone.tokens


def test_every_bit_is_the_same_alone_among_others_and_after_a_restart() -> None:
    """Tokens and log-probabilities do not depend on prompts, decoding, cancels and reused slots beside them."""
    mine = request("mine", "The little dog ran home and " * 3, max_tokens=10, seed=77, logprobs=5)
    harness = Harness(slots=32, prefill_tokens=256, prefix_bytes=1 << 20)
    harness.add(1, seed=0)
    try:
        (alone,) = harness.generate(replace(mine, id="alone"))
        (again,) = harness.generate(replace(mine, id="again"))
        generator = np.random.default_rng(3)
        strangers = [
            request(f"s{i}", "x" * int(generator.integers(1, 90)), seed=i, max_tokens=int(generator.integers(1, 60)))
            for i in range(31)
        ]
        harness.submit(*strangers[:20], replace(mine, id="among"), *strangers[20:])
        harness.engine.cancel("s3")
        among = harness.wait("among")
    finally:
        harness.engine.stop()
    restarted = Harness(slots=2)
    restarted.add(1, seed=0)
    try:
        (later,) = restarted.generate(replace(mine, id="later"))
    finally:
        restarted.engine.stop()
    assert again.finished.cached_prompt_tokens == 64
    assert alone.draws == again.draws == among.draws == later.draws
    assert all(draw.logprob is not None and len(draw.alternatives) == 5 for draw in alone.draws)


def test_samples_share_one_computation_of_the_prompt_and_draw_as_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "z" * 70
    alone = harness.generate(*(request(f"a{i}", prompt, seed=1234 + i) for i in range(3)))
    read: list[int] = []

    def count(spans: Sequence[Span]) -> bool:
        read.extend(len(span.tokens) for span in spans if span.start < 70)
        return False

    break_forward(monkeypatch, count)
    together = harness.samples(request("n", prompt, samples=3))
    assert sum(read) == 70
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in together}) == 3
    assert {one.finished.generated_tokens for one in together} == {20}


def test_a_stream_gets_a_token_in_every_step_beside_any_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promise of the scheduler, in the engine."""
    harness = Harness(slots=4, prefill_tokens=64)
    harness.add(1, seed=0)
    read: list[int] = []

    def note(spans: Sequence[Span]) -> bool:
        read.append(sum(len(span.tokens) for span in spans if len(span.tokens) > 1))
        return False

    break_forward(monkeypatch, note)
    generator = np.random.default_rng(11)
    try:
        for wave in range(6):
            names = [f"{wave}-{number}" for number in range(10)]
            for name in names:
                prompt, tokens = "x" * int(generator.integers(1, 56)), int(generator.integers(1, 40))
                harness.submit(request(name, prompt, max_tokens=tokens))
            # More arrive while these run.
            harness.wait(names[wave])
        for name in harness.names:
            harness.wait(name)
    finally:
        harness.engine.stop()
    assert max(read) <= 64
    drawn = [
        {output.request_id for output in step if isinstance(output.event, Delta) and output.event.draws}
        for step in harness.steps
    ]
    drawn = [names for names in drawn if names]
    for name in harness.names:
        places = [place for place, names in enumerate(drawn) if name in names]
        assert places == list(range(places[0], places[-1] + 1))


def test_a_request_waits_for_slots_for_all_its_samples_and_none_overtakes_it(harness: Harness) -> None:
    harness.submit(request("short", max_tokens=5), request("long", max_tokens=40))
    harness.submit(request("n", samples=SLOTS, max_tokens=2), request("after", max_tokens=2))
    for index in range(SLOTS):
        assert harness.wait("n", index=index).finished.generated_tokens == 2
    harness.wait("after")

    def step_of(name: str, kind: type[Event]) -> int:
        return min(
            number
            for number, step in enumerate(harness.steps)
            for output in step
            if output.request_id == name and isinstance(output.event, kind)
        )

    # Two slots were free all the time.
    assert step_of("short", Finished) < step_of("long", Finished) < step_of("n", Admitted)
    assert step_of("n", Finished) < step_of("after", Admitted)


def test_versions_take_turns_if_both_have_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(slots=8, prefill_tokens=64)
    for version in (1, 2):
        harness.add(version, seed=version)
    readers: list[int] = []

    def note(spans: Sequence[Span]) -> bool:
        readers.extend(int(span.tokens[0]) for span in spans if len(span.tokens) > 1)
        return False

    break_forward(monkeypatch, note)
    try:
        harness.submit(
            *(request(f"a{i}", "a" * 64, max_tokens=1) for i in range(4)),
            *(request(f"b{i}", "b" * 64, version=2, max_tokens=1) for i in range(4)),
        )
        for name in harness.names:
            harness.wait(name)
    finally:
        harness.engine.stop()
    assert "".join(map(chr, readers)) == "abababab"


def test_a_version_warms_up_between_the_steps_of_the_others(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(3)
    steps = 0
    seen: list[int] = []

    def count(spans: Sequence[Span]) -> bool:
        nonlocal steps
        steps += 1
        time.sleep(0.003)
        return False

    class Warming(CpuDecoder):
        def warm_up(self) -> Iterator[None]:
            for _ in range(5):
                seen.append(steps)
                yield

    break_forward(monkeypatch, count)
    harness.submit(request("running", max_tokens=90))
    harness.wait("running", Delta)
    harness.add_model(2, model, Warming(model, SLOTS, 1, cpu_library(), WeightFormat.FP32))
    assert isinstance(harness.wait("running").events[-1], Finished)
    assert seen == list(range(seen[0], seen[0] + 5))
    (new,) = harness.generate(request("new", version=2))
    assert new.finished.generated_tokens == 20


def test_an_examination_returns_the_held_out_loss_and_disturbs_no_stream(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(3)
    windows = np.random.default_rng(1).integers(0, 256, (3, 90), np.uint16)
    (alone,) = harness.generate(request("alone", max_tokens=90))
    # The lengths of chunks, and 0 for each step between them.
    chunks: list[int] = []
    score = CpuDecoder.score

    def note(self: CpuDecoder, span: Span, targets: Sequence[int]) -> list[float]:
        chunks.append(len(span.tokens))
        return score(self, span, targets)

    def step(spans: Sequence[Span]) -> bool:
        chunks.append(0)
        time.sleep(0.003)
        return False

    monkeypatch.setattr(CpuDecoder, "score", note)
    break_forward(monkeypatch, step)
    harness.submit(request("running", max_tokens=90))
    harness.wait("running", Delta)
    loss = harness.engine.add_version(
        *(2, cpu_decoder(model, SLOTS), byte_tokenizer(), model.config.context_length),
        [tuple(window) for window in windows.tolist()],
    )
    assert loss.result(HANG_S) == pytest.approx(loss_of(model, windows), abs=1e-5)
    assert harness.wait("running").tokens == alone.tokens
    # Short chunks, and never two of them between two tokens.
    whole = [SCORED_TOKENS] * 5 + [9]
    assert [length for length in chunks if length] == 3 * whole
    assert not any(first and second for first, second in itertools.pairwise(chunks))
    idle = harness.engine.add_version(
        *(3, cpu_decoder(model, SLOTS), byte_tokenizer(), model.config.context_length),
        [tuple(window) for window in windows.tolist()],
    )
    assert idle.result(HANG_S) == loss.result()
    assert chunks[-6:] == [64, 25] * 3


def test_a_known_version_is_prepared_before_one_that_is_examined(harness: Harness) -> None:
    model = tiny_model(3)
    order: list[int] = []
    ready = []
    with harness.engine._inbox._changed:
        for version, windows in ((2, [(1,) * 90] * 20), (3, [(1,) * 90] * 20), (4, [])):
            decoder = cpu_decoder(model, SLOTS)
            added = harness.engine.add_version(version, decoder, byte_tokenizer(), 96, windows)
            added.add_done_callback(partial(lambda version, _: order.append(version), version))
            ready.append(added)
    for added in ready:
        added.result(HANG_S)
    assert order == [4, 2, 3]


def test_a_version_that_cannot_warm_up_reports_why_and_harms_no_stream(harness: Harness) -> None:
    model = tiny_model(3)

    class Broken(CpuDecoder):
        def warm_up(self) -> Iterator[None]:
            yield
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        harness.add_model(2, model, Broken(model, SLOTS, 1, cpu_library(), WeightFormat.FP32))
    harness.add(2, seed=3)
    (new,) = harness.generate(request("new", version=2))
    assert new.finished.generated_tokens == 20


def test_a_prompt_with_a_cached_prefix_is_computed_from_its_end() -> None:
    harness = Harness(prefill_tokens=64, prefix_bytes=1 << 20)
    harness.add(1, seed=0)
    harness.add(2, seed=0)
    try:
        begin = "x" * 64
        first, other = harness.generate(request("a", begin + "one"), request("b", "y" * 67))
        same, parted, short = harness.generate(
            request("c", begin + "one"), request("d", begin + "two"), request("e", begin)
        )
        (elsewhere,) = harness.generate(request("f", begin + "one", version=2))
    finally:
        harness.engine.stop()
    cached = [one.finished.cached_prompt_tokens for one in (first, other, same, parted, short, elsewhere)]
    # The last token of a prompt is always computed, and no block comes from another version.
    assert cached == [0, 0, 64, 64, 0, 0]
    assert first.tokens == same.tokens == elsewhere.tokens != parted.tokens


def test_an_old_stream_survives_a_swap(harness: Harness) -> None:
    (alone,) = harness.generate(request("alone", max_tokens=60))
    harness.submit(request("old", max_tokens=60))
    harness.wait("old", Delta)
    harness.add(2, seed=7)
    harness.submit(request("new", version=2, max_tokens=60))
    assert harness.wait("old").tokens == alone.tokens
    assert harness.wait("new").tokens != alone.tokens
    harness.engine.remove_version(1).result(HANG_S)
    (after,) = harness.generate(request("after", version=2, max_tokens=60))
    assert after.tokens == harness.wait("new").tokens


def test_a_removed_version_leaves_no_memory_behind(harness: Harness) -> None:
    harness.add(2, seed=1)
    harness.engine.remove_version(2).result(HANG_S)
    before = mx.get_active_memory()
    for version in range(3, 6):
        harness.add(version, seed=version)
        harness.engine.remove_version(version).result(HANG_S)
    assert mx.get_active_memory() <= before
