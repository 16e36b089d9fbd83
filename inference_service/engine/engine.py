"""The engine: one thread that owns everything MLX and turns requests into events."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as Many
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

import mlx.core as mx

from inference_service.engine.examination import Window, examine
from inference_service.engine.inbox import Command, Inbox
from inference_service.engine.request import (
    FAILURES_WITHIN_S,
    MAX_FAILURES,
    Admitted,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Output,
    StepFailed,
)
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import Plan, Scheduler
from inference_service.engine.sequence import Sequence
from shared.decoding.decoder import Decoder
from shared.decoding.spans import SCORED_TOKENS, SPAN_TOKENS
from shared.device import accelerator
from shared.errors import GptloopError, Unavailable
from shared.gpt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Outbox = Callable[[list[Output]], None]


@dataclass
class _Lane:
    """What serves one version. A broken one takes no streams any more."""

    tokenizer: Tokenizer
    context_length: int
    runner: Runner
    scheduler: Scheduler
    failures: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_FAILURES))
    broken: bool = False


@dataclass(frozen=True)
class _Arriving:
    """A version that is being examined."""

    version: int
    lane: _Lane
    pieces: Generator[None, None, float]
    loss: Future[float]


@dataclass(frozen=True)
class _Running:
    """A request that has not ended, and those of its samples that have not."""

    lane: _Lane
    samples: list[Sequence]


class Engine:
    """Generates for many streams at once, with several versions side by side.

    A step reads at most `prefill_tokens` prompt tokens, of all versions together; where several have prompts to read,
    they take turns, and the scheduler's promises count a version's own turns. `prefix_bytes` is the memory in which a
    version keeps what prompts began with.
    The public methods may be called from any thread and return at once; what they ask for happens between two steps, in
    the order in which it was asked. `outbox` is called on the engine's thread, once a step, and must return at once.
    A step that fails ends the streams that took part in it with `StepFailed`, and what serves their version begins
    anew. A version of which too many steps fail takes no more streams. `failed` is called on the engine's thread once
    where that is so of every version, or where the thread dies of another error; every open stream has ended with
    `Unavailable` then.
    """

    def __init__(
        self, slots: int, prefill_tokens: int, prefix_bytes: int, outbox: Outbox, failed: Callable[[], None]
    ) -> None:
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._prefix_bytes = prefix_bytes
        self._outbox = outbox
        self._failed = failed
        # A stuck one must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._inbox = Inbox()
        # All below are the engine thread's own; others may look at them.
        self._busy_since: float | None = None
        self._examines = False
        self._lanes: dict[int, _Lane] = {}
        self._arriving: deque[_Arriving] = deque()
        self._requests: dict[str, _Running] = {}
        self._outputs: list[Output] = []

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread and waits for it; open streams end with `Unavailable`. Whether it has ended."""
        self.close("The server is stopping.")
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, reason: str) -> None:
        """Takes nothing more, and fails what was promised with `Unavailable`; open streams end when the thread does."""
        self._inbox.close(reason)

    @property
    def busy_since(self) -> float | None:
        """When a single step, one command or one piece of an examination began that is under way now; None if there is
        nothing to do. A time of `time.monotonic`."""
        return self._busy_since

    @property
    def examines(self) -> bool:
        """Whether that is a piece of an examination, which may compile a program."""
        return self._examines

    @property
    def active_streams(self) -> int:
        """How many streams have a slot."""
        return sum(len(lane.scheduler.running) for lane in self._lanes.copy().values())

    def add_version(
        self,
        version: int,
        decoder: Decoder,
        tokenizer: Tokenizer,
        context_length: int,
        windows: Many[Window] = (),
    ) -> Future[float]:
        """Makes a version ready, piece by piece between the steps of the others.

        The future tells when, with the mean loss in nats of the windows' tokens (T+1 each) as the version would serve
        them; or why not. A version without windows goes before those that are examined.
        """
        loss: Future[float] = Future()

        def add() -> None:
            blocks = self._prefix_bytes // (SPAN_TOKENS * decoder.token_bytes)
            lane = _Lane(tokenizer, context_length, Runner(decoder, blocks), Scheduler(self._slots))
            arriving = _Arriving(version, lane, examine(decoder, windows, self._scored_tokens), loss)
            if windows:
                self._arriving.append(arriving)
            else:
                self._arriving.appendleft(arriving)

        self._inbox.promise(loss, add)
        return loss

    def remove_version(self, version: int) -> Future[None]:
        """Frees the weights and the cache of a version without streams; the future tells when that is done."""
        gone: Future[None] = Future()

        def remove() -> None:
            assert not self._lanes[version].scheduler.sequences
            del self._lanes[version]
            accelerator.release_memory()
            self._inbox.keep(gone, None)
            if self._all_broken():
                raise RuntimeError(f"Version {version} is gone, and too many steps of all that are left failed.")

        self._inbox.promise(gone, remove)
        return gone

    def submit(self, request: GenerationRequest) -> None:
        """Starts the samples of a request on a version that was added, no more of them than there are slots.

        Raises `Unavailable` where the engine does not run any more.
        """

        def add() -> None:
            lane = self._lanes[request.version]
            samples = [
                Sequence(request, index, lane.context_length, lane.tokenizer.end_token, lane.tokenizer.piece)
                for index in range(request.samples)
            ]
            lane.scheduler.add(tuple(samples))
            self._requests[request.id] = _Running(lane, samples)
            if lane.broken:
                self._fail(samples, StepFailed("Too many steps of this version failed; ask for another one."))

        self._inbox.post(add, opens=request)

    def cancel(self, request_id: str) -> None:
        """Ends a request with the reason CANCELLED; nothing happens where it has ended."""

        def cancel() -> None:
            if (running := self._requests.get(request_id)) is not None:
                self._end(running, FinishReason.CANCELLED, time.monotonic())

        # A closed engine ends it anyway.
        with suppress(Unavailable):
            self._inbox.post(cancel)

    def _work(self) -> None:
        try:
            while (commands := self._asked()) is not None:
                while commands:
                    self._busy_since = time.monotonic()
                    # None is kept: it can hold the weights of a version.
                    commands.pop(0)()
                self._expire()
                self._step()
                self._examine()
                self._send()
        except BaseException:
            logger.exception("the engine failed")
            self.close("The engine failed and the server restarts; ask again in a moment.")
            try:
                self._end_open()
            finally:
                self._failed()
        else:
            self._end_open()
        finally:
            self._busy_since = None
            # MLX aborts the process where it ends before this thread's stream does.
            self._requests.clear()
            self._arriving.clear()
            self._lanes.clear()
            mx.clear_streams()

    def _asked(self) -> list[Command] | None:
        """What was asked since; waits where there is nothing else to do. None: the engine is to end."""
        self._busy_since = None
        return self._inbox.take(wait=not (self._requests or self._arriving))

    def _expire(self) -> None:
        now = time.monotonic()
        for running in list(self._requests.values()):
            deadline = running.samples[0].request.deadline
            if deadline is not None and deadline <= now:
                self._end(running, FinishReason.DEADLINE, now)

    def _step(self) -> None:
        budget = self._prefill_tokens
        for version, lane in list(self._lanes.items()):
            self._busy_since = time.monotonic()
            self._admit(lane)
            plan = lane.scheduler.plan(budget)
            if plan is None:
                continue
            budget -= plan.prompt_tokens
            if plan.chunks:
                # Whoever reads goes to the end, so that each version can have the whole budget in its turn.
                others = {other: self._lanes[other] for other in self._lanes if other != version}
                self._lanes = {**others, version: lane}
            self._run(lane, plan)

    def _examine(self) -> None:
        """A piece of what the next version goes through before it is ready."""
        if not self._arriving:
            return
        arriving = self._arriving[0]
        self._busy_since = time.monotonic()
        self._examines = True
        try:
            next(arriving.pieces)
            return
        except StopIteration as end:
            result: object = end.value
            self._lanes[arriving.version] = arriving.lane
        except Exception as failure:
            logger.exception("version %d cannot be made ready", arriving.version)
            # Its frames hold the weights.
            result = failure.with_traceback(None)
        finally:
            self._examines = False
        self._arriving.popleft()
        self._inbox.keep(arriving.loss, result)
        if isinstance(result, Exception):
            del arriving
            accelerator.release_memory()

    def _scored_tokens(self) -> int:
        """How long a piece of an examination may be: short as long as streams wait for it."""
        return SCORED_TOKENS if self._requests else SPAN_TOKENS

    def _admit(self, lane: _Lane) -> None:
        for group in lane.scheduler.admit():
            try:
                lane.runner.reuse(group[0], lane.scheduler.slot_of(group[0]))
            except Exception:
                self._recover(lane, lane.scheduler.running)
                return
            now = time.monotonic()
            for sequence in group:
                sequence.cached = group[0].cached
                sequence.admitted_at = now
            self._emit(group[0], [Admitted(now)])

    def _run(self, lane: _Lane, plan: Plan) -> None:
        try:
            draws = lane.runner.run(plan)
        except Exception:
            self._recover(lane, plan.sequences)
            return
        lane.scheduler.record(plan)
        now = time.monotonic()
        for sequence, draw in draws:
            events: list[Event] = [Failed(draw)] if isinstance(draw, GptloopError) else sequence.accept(draw, now)
            self._finish_step(sequence, events)

    def _recover(self, lane: _Lane, sequences: Many[Sequence]) -> None:
        """After a step that failed: its streams end, the others go on, and nothing of what the slots held is used."""
        now = time.monotonic()
        logger.exception("a step of %d streams failed", len(sequences))
        if len(lane.failures) == MAX_FAILURES and now - lane.failures[0] < FAILURES_WITHIN_S:
            lane.broken = True
            if self._all_broken():
                raise
            sequences = lane.scheduler.sequences
        lane.failures.append(now)
        self._fail(sequences, StepFailed("The step that this stream was in failed; ask again."))
        lane.scheduler.forget_prompts()
        lane.runner.reset()

    def _all_broken(self) -> bool:
        """Whether there are versions, and none that takes streams."""
        return bool(self._lanes) and all(lane.broken for lane in self._lanes.values())

    def _fail(self, sequences: Many[Sequence], error: GptloopError) -> None:
        for sequence in tuple(sequences):
            self._finish_step(sequence, [Failed(error)])

    def _end(self, running: _Running, reason: FinishReason, now: float) -> None:
        for sequence in running.samples.copy():
            if sequence.read > 0 and not sequence.prefilled:
                running.lane.runner.drop(running.lane.scheduler.slot_of(sequence))
            self._finish_step(sequence, sequence.end(reason, now))

    def _finish_step(self, sequence: Sequence, events: list[Event]) -> None:
        """Sends what a step gave to a sequence, and lets it go where that was its end."""
        self._emit(sequence, events)
        if isinstance(events[-1], Finished | Failed):
            running = self._requests[sequence.request.id]
            running.lane.scheduler.remove(sequence)
            running.samples.remove(sequence)
            if not running.samples:
                del self._requests[sequence.request.id]

    def _emit(self, sequence: Sequence, events: list[Event]) -> None:
        self._outputs += [Output(sequence.request.id, sequence.index, event) for event in events]

    def _send(self) -> None:
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        self._inbox.note_ends(outputs)
        self._outbox(outputs)

    def _end_open(self) -> None:
        self._send()
        self._outbox(self._inbox.fail_open())
