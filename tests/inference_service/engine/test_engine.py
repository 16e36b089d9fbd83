"""The engine on a tiny real model, with its real thread."""

import math
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from inference_service.engine.engine import Engine
from inference_service.engine.request import (
    Admitted,
    Delta,
    Draw,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    NotFinite,
    Output,
)
from shared.errors import Unavailable
from shared.gpt.sampling import SamplingParameters
from tests.fakes import TINY, byte_tokenizer, tiny_model

LIMIT_S = 30.0
SLOTS = 4


@dataclass
class Result:
    events: list[Event]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def draws(self) -> list[Draw]:
        return [draw for event in self.events if isinstance(event, Delta) for draw in event.draws]

    @property
    def tokens(self) -> list[int]:
        return [draw.token for draw in self.draws]

    @property
    def finished(self) -> Finished:
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return self.events[-1]


class Harness:
    """An engine whose events are read by the test's thread."""

    def __init__(self) -> None:
        self.failures = 0
        self._outbox: queue.Queue[list[Output]] = queue.Queue()
        self._results: dict[str, Result] = {}
        self.engine = Engine(SLOTS, self._outbox.put, self._fail)
        self.engine.start()

    def _fail(self) -> None:
        self.failures += 1

    def add(self, version: int, seed: int) -> None:
        self.engine.add_version(version, tiny_model(seed), byte_tokenizer()).result(LIMIT_S)

    def submit(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self._results[request.id] = Result([])
            self.engine.submit(request)

    def wait(self, request_id: str, kind: type[Event] | tuple[type[Event], ...] = (Finished, Failed)) -> Result:
        """Reads events until this stream has one of a kind."""
        result = self._results[request_id]
        while not any(isinstance(event, kind) for event in result.events):
            for output in self._outbox.get(timeout=LIMIT_S):
                self._results[output.request_id].events.append(output.event)
        return result

    def generate(self, *requests: GenerationRequest) -> list[Result]:
        self.submit(*requests)
        return [self.wait(request.id) for request in requests]


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    harness.add(1, seed=0)
    yield harness
    harness.engine.stop()


def request(name: str, prompt: str = "Once", **values: object) -> GenerationRequest:
    base = GenerationRequest(
        id=name,
        version=1,
        prompt=tuple(prompt.encode()),
        seed=1234,
        max_tokens=20,
        arrived=time.monotonic(),
        sampling=SamplingParameters(temperature=1.0),
        ignore_eos=True,
    )
    return replace(base, **values)  # type: ignore[arg-type]


def test_streams_together_equal_each_alone(harness: Harness) -> None:
    prompts = ["Once", "x" * 70, "The dog", "A", "Then they", "z" * 30]
    together = harness.generate(*(request(f"t{i}", prompt, seed=i) for i, prompt in enumerate(prompts)))
    for i, prompt in enumerate(prompts):
        (alone,) = harness.generate(request(f"a{i}", prompt, seed=i))
        assert together[i].tokens == alone.tokens
        assert together[i].text == alone.text


def test_a_stream_that_joins_others_equals_itself_alone(harness: Harness) -> None:
    long = "x" * 80
    (alone,) = harness.generate(request("alone", long, max_tokens=10))
    endless = [request(f"e{i}", long[:70], max_tokens=20) for i in range(SLOTS - 1)]
    harness.submit(*endless)
    for one in endless:
        harness.wait(one.id, Delta)
    (joined,) = harness.generate(request("joined", long, max_tokens=10))
    assert joined.tokens == alone.tokens


def test_the_same_seed_gives_the_same_tokens_and_another_one_others(harness: Harness) -> None:
    first, second, third = harness.generate(request("a"), request("b"), request("c", seed=99))
    assert first.tokens == second.tokens != third.tokens


def test_greedy_tokens_equal_those_of_a_full_forward(harness: Harness) -> None:
    (result,) = harness.generate(request("a", sampling=SamplingParameters(temperature=0.0)))
    model = tiny_model(0)
    tokens = list(b"Once")
    for token in result.tokens:
        logits = model(mx.array([tokens]))[0, -1]
        logits[256] = -mx.inf
        assert int(mx.argmax(logits)) == token
        tokens.append(token)


def test_an_old_stream_survives_a_swap(harness: Harness) -> None:
    (alone,) = harness.generate(request("alone", max_tokens=60))
    harness.submit(request("old", max_tokens=60))
    harness.wait("old", Delta)
    harness.add(2, seed=7)
    harness.submit(request("new", version=2, max_tokens=60))
    assert harness.wait("old").tokens == alone.tokens
    assert harness.wait("new").tokens != alone.tokens
    harness.engine.remove_version(1).result(LIMIT_S)
    (after,) = harness.generate(request("after", version=2, max_tokens=60))
    assert after.tokens == harness.wait("new").tokens


def test_a_removed_version_leaves_no_memory_behind(harness: Harness) -> None:
    harness.add(2, seed=1)
    harness.engine.remove_version(2).result(LIMIT_S)
    before = mx.get_active_memory()
    for version in range(3, 6):
        harness.add(version, seed=version)
        harness.engine.remove_version(version).result(LIMIT_S)
    assert mx.get_active_memory() <= before


def test_a_cancelled_stream_frees_its_slot(harness: Harness) -> None:
    endless = [request(f"e{i}", max_tokens=90) for i in range(SLOTS)]
    harness.submit(*endless, request("waiting", max_tokens=2))
    harness.wait("e0", Admitted)
    harness.engine.cancel("e0")
    assert harness.wait("e0").finished.reason is FinishReason.CANCELLED
    assert harness.wait("waiting").finished.reason is FinishReason.LENGTH


def test_a_waiting_stream_can_be_cancelled(harness: Harness) -> None:
    harness.submit(*(request(f"e{i}", max_tokens=90) for i in range(SLOTS)), request("waiting"))
    harness.engine.cancel("waiting")
    finished = harness.wait("waiting").finished
    assert finished.reason is FinishReason.CANCELLED
    assert finished.queue_s is None
    assert finished.generated_tokens == 0


def test_a_deadline_ends_a_stream_where_it_is(harness: Harness) -> None:
    past = time.monotonic() - 1.0
    harness.submit(request("running", max_tokens=90), request("late", deadline=past))
    assert harness.wait("late").finished.reason is FinishReason.DEADLINE
    assert harness.wait("running").finished.reason is FinishReason.LENGTH


def test_generation_ends_before_a_stop_text(harness: Harness) -> None:
    (whole,) = harness.generate(request("whole", max_tokens=40))
    stop = whole.text[10:13]
    (stopped,) = harness.generate(request("stopped", max_tokens=40, stop=(stop, "never so")))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert (stopped.finished.reason, stopped.finished.matched_stop) == (FinishReason.STOP, stop)


def test_the_end_token_ends_a_stream_unless_it_is_forbidden(harness: Harness) -> None:
    # A penalty below 1 on a prompt full of end tokens makes the end token certain.
    likely = SamplingParameters(temperature=0.0, repetition_penalty=0.001)
    prompt = (256,) * 8
    ended, later, never = harness.generate(
        replace(request("ended"), prompt=prompt, sampling=likely, ignore_eos=False),
        replace(request("later"), prompt=prompt, sampling=likely, ignore_eos=False, min_tokens=5),
        replace(request("never"), prompt=prompt, sampling=likely),
    )
    assert (ended.finished.reason, ended.tokens) == (FinishReason.EOS, [256])
    assert 256 not in later.tokens[:5]
    assert never.finished.reason is FinishReason.LENGTH
    assert 256 not in never.tokens


def test_the_context_ends_a_stream(harness: Harness) -> None:
    (result,) = harness.generate(request("a", "x" * (TINY.context_length - 3), max_tokens=50))
    assert result.finished.reason is FinishReason.CONTEXT_LENGTH
    assert result.finished.generated_tokens == len(result.tokens) == 3


def test_logprobs_are_those_of_the_model(harness: Harness) -> None:
    (result,) = harness.generate(request("a", logprobs=3, sampling=SamplingParameters(temperature=0.5), max_tokens=10))
    model = tiny_model(0)
    logits = model(mx.array([[*b"Once", *result.tokens]]))[0].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for i, draw in enumerate(result.draws):
        row = np.asarray(expected[3 + i])
        assert draw.logprob == pytest.approx(float(row[draw.token]), abs=1e-4)
        assert [other.logprob for other in draw.alternatives] == pytest.approx(
            np.sort(row)[::-1][:3].tolist(), abs=1e-4
        )


def test_all_alternatives_sum_to_one(harness: Harness) -> None:
    (result,) = harness.generate(request("a", logprobs=257, max_tokens=1))
    assert sum(math.exp(other.logprob) for other in result.draws[0].alternatives) == pytest.approx(1.0)


def test_counts_and_times_are_those_of_the_stream(harness: Harness) -> None:
    (result,) = harness.generate(request("a"))
    finished = result.finished
    assert (finished.prompt_tokens, finished.generated_tokens) == (4, 20)
    assert finished.queue_s is not None and finished.first_token_s is not None
    assert 0 <= finished.queue_s <= finished.first_token_s <= finished.total_s


def test_numbers_that_are_not_finite_end_their_stream_alone() -> None:
    harness = Harness()
    model = tiny_model(0)
    weight = model.token_embedding.weight
    weight[ord("!")] = 1e38
    model.token_embedding.weight = weight
    mx.eval(model)
    harness.engine.add_version(1, model, byte_tokenizer()).result(LIMIT_S)
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


def test_a_failing_engine_leaves_no_stream_hanging(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    harness.submit(request("a", max_tokens=90))
    harness.wait("a", Delta)

    def fail(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("inference_service.engine.runner.Runner.run", fail)
    harness.submit(request("b"))
    for name in ("a", "b"):
        last = harness.wait(name).events[-1]
        assert isinstance(last, Failed)
        assert isinstance(last.error, Unavailable)
    with pytest.raises(Unavailable, match="engine failed"):
        harness.engine.submit(request("c"))
    harness.engine.stop()
    assert harness.failures == 1


def test_stopping_ends_open_streams(harness: Harness) -> None:
    harness.submit(request("a", max_tokens=90))
    harness.wait("a", Admitted)
    harness.engine.stop()
    last = harness.wait("a").events[-1]
    assert isinstance(last, Failed)
    assert harness.failures == 0
