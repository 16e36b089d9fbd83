"""Streams end by a cancel, a deadline, a failure, or a stuck step."""

import gc
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import pytest

from inference_service.engine import engine
from inference_service.engine.request import Admitted, Failed, FinishReason
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.mlx_decoder import MlxDecoder
from shared.decoding.spans import Span
from shared.decoding.weight_format import WeightFormat
from shared.device import accelerator
from shared.errors import Unavailable
from tests.decoders import cpu_decoder, cpu_library, mlx_decoder
from tests.fakes import byte_tokenizer, tiny_model
from tests.inference_service.engine.harness import SLOTS, Harness, Result, break_forward, request, slow_steps
from tests.waiting import HANG_S, wait_until

# The stages of a stream whose prompt has two chunks, computed in one step each.
STAGES = ["waiting", "reading", "decoding"]
PROMPT = "x" * 80


def end_in_stage(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, stage: str, deadline: float | None, act: Callable[[], None]
) -> Result:
    """Lets `act` happen on the engine's thread, in a step in which the stream "gone" is in a stage; what came of it.

    Another request waits for its slot. Checks that what follows happens in the next step.
    """
    acted = threading.Event()

    def hook(spans: Sequence[Span]) -> bool:
        now = {
            "waiting": True,
            "reading": any(span.start == 0 and span.tokens[0] == ord("x") for span in spans),
            "decoding": any(span.start == len(PROMPT) + 1 for span in spans),
        }
        if now[stage] and not acted.is_set():
            acted.set()
            act()
        return False

    break_forward(monkeypatch, hook)
    others = SLOTS if stage == "waiting" else SLOTS - 1
    harness.submit(
        *(request(f"other{number}", max_tokens=90) for number in range(others)),
        request("gone", PROMPT, max_tokens=15, deadline=deadline),
        request("next", max_tokens=2),
    )
    gone = harness.wait("gone")
    assert acted.is_set()
    (last,) = [step for step in harness.steps if any(output.event is gone.finished for output in step)]
    admitted = [output.request_id for output in last if isinstance(output.event, Admitted)]
    assert admitted == ([] if stage == "waiting" else ["next"])
    assert harness.wait("next").finished.reason is FinishReason.LENGTH
    generated = {"waiting": 0, "reading": 0, "decoding": 3}[stage]
    assert gone.finished.generated_tokens == len(gone.tokens) == generated
    assert (gone.finished.queue_s is None) == (stage == "waiting")
    return gone


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancel_frees_everything_within_a_step(harness: Harness, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    gone = end_in_stage(harness, monkeypatch, stage, None, lambda: harness.engine.cancel("gone"))
    assert gone.finished.reason is FinishReason.CANCELLED


@pytest.mark.parametrize("stage", STAGES)
def test_a_deadline_ends_a_request_at_every_stage(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    deadline = time.monotonic() + 0.3
    gone = end_in_stage(
        harness, monkeypatch, stage, deadline, lambda: time.sleep(max(0.0, deadline - time.monotonic()))
    )
    assert gone.finished.reason is FinishReason.DEADLINE


def test_a_half_computed_prompt_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose attention multiplies masked numbers, NaN in a slot would reach the next stream."""
    harness = Harness(slots=2)
    model = tiny_model(0)
    model.position_embedding.weight[40] = mx.nan
    mx.eval(model)
    harness.add_model(1, model, mlx_decoder(model, 2))
    read = MlxDecoder.forward

    def cancel(self: MlxDecoder, spans: Sequence[Span]) -> Sequence[Any]:
        if spans[0].tokens[0] == ord("!"):
            harness.engine.cancel("bad")
        return read(self, spans)

    try:
        (alone,) = harness.generate(request("alone"))
        monkeypatch.setattr(MlxDecoder, "forward", cancel)
        (bad,) = harness.generate(request("bad", "!" * 80))
        after = harness.generate(request("after0"), request("after1"))
    finally:
        harness.engine.stop()
    assert bad.finished.reason is FinishReason.CANCELLED
    assert [one.tokens for one in after] == [alone.tokens] * 2


def busy_s(harness: Harness) -> float:
    since = harness.engine.busy_since
    return 0.0 if since is None else time.monotonic() - since


def test_a_step_that_does_not_end_shows(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def hang(spans: Sequence[Span]) -> bool:
        go_on.wait(HANG_S)
        return False

    wait_until(lambda: busy_s(harness) == 0.0)
    with monkeypatch.context() as patch:
        break_forward(patch, hang)
        harness.submit(request("a"))
        deadline = time.monotonic() + HANG_S
        while busy_s(harness) < 0.05:
            assert time.monotonic() < deadline
        waiting = harness.engine.remove_version(1)
        assert not harness.engine.stop(timeout_s=0.0)
        # A future fails if a stuck engine is closed.
        with pytest.raises(Unavailable, match="stopping"):
            waiting.result(HANG_S)
        go_on.set()
        assert isinstance(harness.wait("a").events[-1], Failed)
    assert harness.engine.stop()
    assert busy_s(harness) == 0.0


def test_ten_thousand_cancels_leave_memory_flat(harness: Harness) -> None:
    reasons: Counter[FinishReason] = Counter()

    def cancel_many(count: int) -> None:
        for number in range(0, count, 8):
            names = [f"{number}-{one}" for one in range(8)]
            harness.submit(
                *(
                    request(name, "x" * (10 * one + 1), samples=1 + one % 2, max_tokens=90)
                    for one, name in enumerate(names)
                )
            )
            if number % 3 == 0:
                harness.wait(names[0], Admitted)
            for name in names:
                harness.engine.cancel(name)
            for name in names:
                reasons[harness.wait(name).finished.reason] += 1
                del harness._results[name]
            harness.steps.clear()

    cancel_many(2000)
    gc.collect()
    before = accelerator.memory()
    cancel_many(10_000)
    gc.collect()
    after = accelerator.memory()
    assert after.active_bytes <= before.active_bytes
    assert after.resident_bytes - before.resident_bytes < 4 << 20
    # If the machine delays this thread, a stream can get its last token before the cancel.
    assert reasons[FinishReason.CANCELLED] > 10_000
    assert harness.engine._inbox._open == {} and harness.engine._requests == {}


def test_stopping_ends_open_streams(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_steps(monkeypatch)
    harness.submit(request("a", max_tokens=90))
    harness.wait("a", Admitted)
    harness.engine.stop()
    last = harness.wait("a").events[-1]
    assert isinstance(last, Failed)
    assert harness.failures == 0


def test_a_caller_that_stops_waiting_for_a_version_does_not_disturb_the_engine(harness: Harness) -> None:
    decoder = cpu_decoder(tiny_model(1), SLOTS)
    loss = harness.engine.add_version(2, decoder, byte_tokenizer(), 96, [(1,) * 90] * 50)
    assert not loss.cancel()
    assert harness.generate(request("a"))[0].finished.generated_tokens == 20
    harness.engine.stop()
    assert harness.failures == 0


def test_a_version_that_cannot_be_prepared_leaves_no_memory_behind(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The records that pytest keeps hold the frames of the failure.
    monkeypatch.setattr(engine, "logger", logging.getLogger("nobody"))
    monkeypatch.setattr(engine.logger, "disabled", True)

    class Broken(CpuDecoder):
        def warm_up(self) -> Iterator[None]:
            yield
            raise RuntimeError("no memory")

    decoder = Broken(tiny_model(1), SLOTS, 1, cpu_library(), WeightFormat.FP32)
    gone = weakref.ref(decoder)
    with pytest.raises(RuntimeError, match="no memory"):
        harness.engine.add_version(2, decoder, byte_tokenizer(), 96).result(HANG_S)
    del decoder
    deadline = time.monotonic() + HANG_S
    while gone() is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
