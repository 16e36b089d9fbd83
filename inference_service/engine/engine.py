"""The engine: one thread that owns all MLX objects and turns requests into events."""

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
    PromptRead,
    StepFailed,
)
from inference_service.engine.runner import NextTokens, Runner
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
    """Everything that serves one version. A broken lane accepts no more streams."""

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
    examination: Generator[None, None, float]
    loss: Future[float]


@dataclass(frozen=True)
class _Running:
    """A request that has not ended, and those of its samples that have not ended."""

    lane: _Lane
    samples: list[Sequence]


class Engine:
    """Generates for many streams at once, with several versions side by side.

    A step computes at most `prefill_tokens` prompt tokens, of all versions together. If several have prompts to
    compute, they take turns, and the scheduler's promises count the turns of a version. `prefix_bytes` is the size of
    each version's prefix cache.
    Any thread may call the public methods, which return at once; the engine carries them out between two steps, in the
    order of the calls. It calls `outbox` on its own thread, once per step, and `outbox` must return at once.
    If a step fails, its streams end with `StepFailed`, and the slots and prefixes of the version are discarded. After
    too many failures a version accepts no more streams. If that is true of all versions, or if the thread dies of
    another error, all open streams end with `Unavailable`, and the engine calls `failed` once on its thread.
    """

    def __init__(
        self, slots: int, prefill_tokens: int, prefix_bytes: int, outbox: Outbox, failed: Callable[[], None]
    ) -> None:
        self._slots = slots
        self._prefill_tokens = prefill_tokens
        self._prefix_bytes = prefix_bytes
        self._outbox = outbox
        self._failed = failed
        # A daemon, so that a stuck thread does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._inbox = Inbox()
        # Only the engine's thread changes these; other threads may read them.
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
        """Ends the thread, and open streams with `Unavailable`; returns whether the thread has ended in time."""
        self.close("The server is stopping.")
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self, reason: str) -> None:
        """Accepts no more calls and fails pending futures with `Unavailable`; open streams end when the thread ends."""
        self._inbox.close(reason)

    @property
    def busy_since(self) -> float | None:
        """When the current step, command or part of an examination began, as in `time.monotonic`; None if idle."""
        return self._busy_since

    @property
    def examines(self) -> bool:
        """Whether the current work is part of an examination, which may compile a program."""
        return self._examines

    @property
    def active_streams(self) -> int:
        """The number of streams that have a slot."""
        return sum(len(lane.scheduler.running) for lane in self._lanes.copy().values())

    def add_version(
        self,
        version: int,
        decoder: Decoder,
        tokenizer: Tokenizer,
        context_length: int,
        windows: Many[Window] = (),
    ) -> Future[float]:
        """Prepares a version, in small parts between the steps of the others.

        The future returns the mean loss in nats per token of the windows (T+1 tokens each), as the version would serve
        them, or raises the reason why the version is not ready. A version without windows is prepared before others.
        """
        loss: Future[float] = Future()

        def add() -> None:
            blocks = self._prefix_bytes // (SPAN_TOKENS * decoder.bytes_per_token)
            lane = _Lane(tokenizer, context_length, Runner(decoder, blocks), Scheduler(self._slots))
            arriving = _Arriving(version, lane, examine(decoder, windows, self._scored_tokens), loss)
            if windows:
                self._arriving.append(arriving)
            else:
                self._arriving.appendleft(arriving)

        self._inbox.promise(loss, add)
        return loss

    def remove_version(self, version: int) -> Future[None]:
        """Frees the weights and the cache of a version without streams; the future returns when that is done."""
        gone: Future[None] = Future()

        def remove() -> None:
            assert not self._lanes[version].scheduler.sequences
            del self._lanes[version]
            accelerator.release_memory()
            self._inbox.keep(gone, None)
            if self._all_broken():
                raise RuntimeError(f"Version {version} was removed, and all that are left have failed too often.")

        self._inbox.promise(gone, remove)
        return gone

    def submit(self, request: GenerationRequest) -> None:
        """Starts the samples of a request, no more than there are slots, on a version that was added.

        Raises `Unavailable` if the engine has ended.
        """

        def add() -> None:
            lane = self._lanes[request.version]
            samples = [
                Sequence(request, index, lane.context_length, lane.tokenizer.end_token, lane.tokenizer.token_bytes)
                for index in range(request.samples)
            ]
            lane.scheduler.add(tuple(samples))
            self._requests[request.id] = _Running(lane, samples)
            if lane.broken:
                self._fail(samples, StepFailed("Too many steps of this version have failed; choose another version."))

        self._inbox.post(add, opens=request)

    def cancel(self, request_id: str) -> None:
        """Ends a request with the reason CANCELLED, unless it has ended."""

        def cancel() -> None:
            if (running := self._requests.get(request_id)) is not None:
                self._end(running, FinishReason.CANCELLED, time.monotonic())

        # A closed engine ends all requests.
        with suppress(Unavailable):
            self._inbox.post(cancel)

    def _work(self) -> None:
        try:
            while (commands := self._take_commands()) is not None:
                while commands:
                    self._busy_since = time.monotonic()
                    # Drops each command after its call: it may hold the weights of a version.
                    commands.pop(0)()
                self._expire()
                self._step()
                self._examine()
                self._send()
        except BaseException:
            logger.exception("the engine failed")
            self.close("The engine failed and the server restarts; try again in a moment.")
            try:
                self._end_open()
            finally:
                self._failed()
        else:
            self._end_open()
        finally:
            self._busy_since = None
            # MLX aborts the process if it ends before the stream of this thread.
            self._requests.clear()
            self._arriving.clear()
            self._lanes.clear()
            mx.clear_streams()

    def _take_commands(self) -> list[Command] | None:
        """Takes new commands; waits for one if there is no other work. None if the engine must end."""
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
            plan = lane.scheduler.plan(budget, lane.runner.max_decode_steps)
            if plan is None:
                continue
            budget -= plan.prompt_tokens
            if plan.chunks:
                # This version goes last next time, so that each can have the whole budget in its turn.
                others = {other: self._lanes[other] for other in self._lanes if other != version}
                self._lanes = {**others, version: lane}
            self._run(lane, plan)

    def _examine(self) -> None:
        """Carries on with the examination of the next version."""
        if not self._arriving:
            return
        arriving = self._arriving[0]
        self._busy_since = time.monotonic()
        self._examines = True
        try:
            next(arriving.examination)
            return
        except StopIteration as end:
            result: object = end.value
            self._lanes[arriving.version] = arriving.lane
        except Exception as failure:
            ids = {"version": arriving.version}
            logger.exception("version %d cannot be prepared", arriving.version, extra={"ids": ids})
            # The frames of the traceback hold the weights.
            result = failure.with_traceback(None)
        finally:
            self._examines = False
        self._arriving.popleft()
        self._inbox.keep(arriving.loss, result)
        if isinstance(result, Exception):
            del arriving
            accelerator.release_memory()

    def _scored_tokens(self) -> int:
        """Returns the size of a chunk of an examination: small while streams wait for it."""
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
                sequence.cached_tokens = group[0].cached_tokens
                sequence.admitted_at = now
            self._emit(group[0], [Admitted(now)])

    def _run(self, lane: _Lane, plan: Plan) -> None:
        try:
            results = lane.runner.run(plan)
        except Exception:
            self._recover(lane, plan.sequences)
            return
        lane.scheduler.record(plan)
        now = time.monotonic()
        for sequence, result in results:
            match result:
                case PromptRead():
                    self._emit(sequence, sequence.unreported(result))
                case NextTokens(draws, error):
                    self._finish_step(sequence, sequence.accept(draws, error, now))

    def _recover(self, lane: _Lane, sequences: Many[Sequence]) -> None:
        """Handles a failed step: ends its streams, and discards the content of the slots for the others."""
        now = time.monotonic()
        version = sequences[0].request.version
        named = ", ".join(dict.fromkeys(each.request.call_id for each in sequences))
        logger.exception(
            "a step of %d streams failed, of the requests %s",
            len(sequences),
            named,
            extra={"ids": {"version": version}},
        )
        if len(lane.failures) == MAX_FAILURES and now - lane.failures[0] < FAILURES_WITHIN_S:
            lane.broken = True
            if self._all_broken():
                raise
            sequences = lane.scheduler.sequences
        lane.failures.append(now)
        self._fail(sequences, StepFailed("A step of this stream failed; try again."))
        lane.scheduler.forget_prompts()
        lane.runner.reset()

    def _all_broken(self) -> bool:
        """Whether there are versions, but none that accepts streams."""
        return bool(self._lanes) and all(lane.broken for lane in self._lanes.values())

    def _fail(self, sequences: Many[Sequence], error: GptloopError) -> None:
        for sequence in tuple(sequences):
            self._finish_step(sequence, [Failed(error)])

    def _end(self, running: _Running, reason: FinishReason, now: float) -> None:
        for sequence in running.samples.copy():
            if sequence.computed_tokens > 0 and not sequence.prefilled:
                running.lane.runner.drop(running.lane.scheduler.slot_of(sequence))
            self._finish_step(sequence, sequence.end(reason, now))

    def _finish_step(self, sequence: Sequence, events: list[Event]) -> None:
        """Sends the events of a sequence, and removes it if they end with its last one."""
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
