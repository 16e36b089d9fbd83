"""Failed steps and numbers that are not finite end some streams and not others."""

import threading
from collections.abc import Sequence as Many

import mlx.core as mx
import numpy as np
import pytest

from inference_service.engine import runner
from inference_service.engine.engine import Engine
from inference_service.engine.request import Delta, Draw, Failed, FinishReason, NotFinite, Output, StepFailed
from inference_service.engine.runner import draw_token
from inference_service.engine.sequence import Sequence
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.sampling import Logits, SamplingParameters
from shared.decoding.spans import Span
from shared.errors import Unavailable
from tests.decoders import cpu_decoder
from tests.fakes import byte_tokenizer, tiny_model
from tests.inference_service.engine.harness import SLOTS, Harness, break_forward, request, slow_steps
from tests.waiting import HANG_S


def test_a_failure_at_admission_ends_the_streams_of_that_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(prefix_bytes=1 << 20)
    harness.add(1, seed=0)
    harness.add(2, seed=0)
    try:
        (alone,) = harness.generate(request("alone", "y" * 80, max_tokens=10))
        slow_steps(monkeypatch)
        harness.submit(request("beside", max_tokens=90), request("elsewhere", version=2, max_tokens=90))
        for name in ("beside", "elsewhere"):
            harness.wait(name, Delta)

        def fail(*_: object) -> None:
            raise RuntimeError("no memory")

        with monkeypatch.context() as patch:
            patch.setattr(CpuDecoder, "write", fail)
            (bad,) = harness.generate(request("bad", "y" * 80))
        for result in (bad, harness.wait("beside")):
            last = result.events[-1]
            assert isinstance(last, Failed) and isinstance(last.error, StepFailed)
        assert harness.generate(request("after", "y" * 80, max_tokens=10))[0].tokens == alone.tokens
        assert harness.wait("elsewhere").finished.generated_tokens == 90
        assert harness.failures == 0
    finally:
        harness.engine.stop()


def test_numbers_that_are_not_finite_end_their_stream_alone() -> None:
    harness = Harness()
    model = tiny_model(0)
    weight = model.token_embedding.weight
    weight[ord("!")] = 1e38
    model.token_embedding.weight = weight
    mx.eval(model)
    harness.add_model(1, model)
    greedy = SamplingParameters(temperature=0.0)
    try:
        before, bad, beside = harness.generate(
            request("before", sampling=greedy), request("bad", "a" * 30 + "!" * 30), request("beside", sampling=greedy)
        )
        again = harness.generate(*(request(f"again{i}", sampling=greedy) for i in range(SLOTS)))
    finally:
        harness.engine.stop()
    assert isinstance(bad.events[-1], Failed)
    assert isinstance(bad.events[-1].error, NotFinite)
    assert before.tokens == beside.tokens
    assert all(result.tokens == before.tokens for result in again)


def test_a_prefix_that_was_not_finite_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(prefix_bytes=1 << 20)
    harness.add(1, seed=0)
    begin = "x" * 64
    forward = CpuDecoder.forward
    spoils = iter([True])

    def spoil(self: CpuDecoder, spans: Many[Span]) -> Many[Logits]:
        logits = forward(self, spans)
        if next(spoils, False):
            for keys, values in self._caches:
                keys[:], values[:] = np.nan, np.nan
        return logits

    try:
        (fresh,) = harness.generate(request("fresh", begin + "two"))
        harness.add(2, seed=0)
        monkeypatch.setattr(CpuDecoder, "forward", spoil)
        (bad,) = harness.generate(request("bad", begin + "one", version=2))
        after, later = (harness.generate(request(name, begin + "two", version=2))[0] for name in ("after", "later"))
    finally:
        harness.engine.stop()
    assert isinstance(bad.events[-1], Failed) and isinstance(bad.events[-1].error, NotFinite)
    assert after.tokens == later.tokens == fresh.tokens
    assert [one.finished.cached_prompt_tokens for one in (after, later)] == [0, 64]


def test_a_failed_step_ends_its_own_streams_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(slots=2)
    harness.add(1, seed=0)
    try:
        long = "x" * 90
        alone = {
            one.id: result.tokens
            for one in (request("p", long, max_tokens=3), request("w"))
            for result in harness.generate(one)
        }
        broken = iter([True])
        # The second chunk of a prompt, while another stream decodes and a third one waits.
        break_forward(monkeypatch, lambda spans: any(span.start == 64 for span in spans) and next(broken, False))
        harness.submit(request("decodes", max_tokens=90), request("prompt", long, max_tokens=3), request("waits"))
        for name in ("decodes", "prompt"):
            last = harness.wait(name).events[-1]
            assert isinstance(last, Failed) and isinstance(last.error, StepFailed)
        assert harness.wait("waits").tokens == alone["w"]
        assert harness.generate(request("again", long, max_tokens=3))[0].tokens == alone["p"]
        assert harness.failures == 0
    finally:
        harness.engine.stop()


def test_a_prompt_outside_the_failed_step_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(slots=3, prefix_bytes=1 << 20)
    harness.add(1, seed=0)
    try:
        # The later one has its first chunk from the cache, and waits for the first chunk of the other.
        (alone,) = harness.generate(request("alone", "y" * 80, max_tokens=3))
        broken = iter([True])
        break_forward(
            monkeypatch,
            lambda spans: spans[0].tokens[0] == ord("x") and next(broken, False),
        )
        harness.submit(request("first", "x" * 80, max_tokens=3), request("second", "y" * 80, max_tokens=3))
        assert isinstance(harness.wait("first").events[-1], Failed)
        assert harness.wait("second").tokens == alone.tokens
        assert harness.wait("second").finished.cached_prompt_tokens == 0
    finally:
        harness.engine.stop()


def test_a_failed_draw_ends_one_stream(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(sequence: Sequence, logits: Logits, token: int | None) -> Draw | NotFinite:
        if sequence.request.id == "bad" and sequence.generated_tokens == 3:
            raise ValueError("no")
        return draw_token(sequence, logits, token)

    monkeypatch.setattr(runner, "draw_token", fail)
    bad, good = harness.generate(request("bad", logprobs=0), request("good", logprobs=0))
    assert isinstance(bad.events[-1], Failed) and isinstance(bad.events[-1].error, StepFailed)
    assert len(bad.tokens) == 3
    assert good.finished.reason is FinishReason.LENGTH


def test_an_engine_whose_steps_keep_failing_ends(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    break_forward(monkeypatch, lambda spans: True)
    kinds = []
    for number in range(4):
        (result,) = harness.generate(request(f"r{number}"))
        assert isinstance(result.events[-1], Failed)
        kinds.append(type(result.events[-1].error))
    assert kinds == [StepFailed, StepFailed, StepFailed, Unavailable]
    with pytest.raises(Unavailable, match="engine failed"):
        harness.engine.submit(request("after"))
    with pytest.raises(Unavailable, match="engine failed"):
        harness.add(2, seed=0)
    assert harness.engine.stop()
    assert harness.failures == 1


def test_a_version_whose_steps_keep_failing_ends_alone(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.add(2, seed=0)
    break_forward(monkeypatch, lambda spans: len(spans[0].tokens) == 64)
    harness.submit(request("good", max_tokens=90))
    harness.submit(*(request(f"bad{number}", "x" * 70, version=2, max_tokens=90) for number in range(10)))
    for number in range(10):
        last = harness.wait(f"bad{number}").events[-1]
        assert isinstance(last, Failed) and isinstance(last.error, StepFailed)
    (after,) = harness.generate(request("after", "y", version=2, samples=1))
    assert isinstance(after.events[-1], Failed)
    assert "choose another version" in str(after.events[-1].error)
    assert harness.wait("good").finished.generated_tokens == 90
    assert harness.failures == 0
    harness.engine.remove_version(2).result(HANG_S)
    assert harness.engine._inbox._open == {} and harness.engine._requests == {}
    assert harness.generate(request("last"))[0].finished.generated_tokens == 20


def test_an_engine_ends_if_all_remaining_versions_keep_failing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness.add(2, seed=0)
    break_forward(monkeypatch, lambda spans: spans[0].tokens[0] == ord("x"))
    for number in range(4):
        (bad,) = harness.generate(request(f"bad{number}", "x" * 70, version=2))
        assert isinstance(bad.events[-1], Failed)
    assert harness.generate(request("good"))[0].finished.generated_tokens == 20
    assert harness.failures == 0
    with harness.engine._inbox._changed:
        gone = harness.engine.remove_version(1)
        harness.submit(request("after", version=2))
    gone.result(HANG_S)
    last = harness.wait("after").events[-1]
    assert isinstance(last, Failed) and isinstance(last.error, Unavailable)
    assert harness.engine.stop()
    assert harness.failures == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_reports_its_failure_even_if_the_outbox_fails() -> None:
    failed = threading.Event()

    def outbox(outputs: list[Output]) -> None:
        raise RuntimeError("nobody reads")

    engine = Engine(SLOTS, 64, 0, outbox, failed.set)
    engine.start()
    model = tiny_model(0)
    engine.add_version(1, cpu_decoder(model, SLOTS), byte_tokenizer(), model.config.context_length).result(HANG_S)
    engine.submit(request("one"))
    assert failed.wait(HANG_S)
    with pytest.raises(Unavailable, match="engine failed"):
        engine.submit(request("after"))
    assert engine.stop(HANG_S)
