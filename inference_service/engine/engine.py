"""The engine: one thread that owns everything MLX and turns requests into events."""

import gc
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import mlx.core as mx

from inference_service.engine.request import (
    Admitted,
    Draw,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    NotFinite,
    Output,
)
from inference_service.engine.runner import Runner
from inference_service.engine.scheduler import Scheduler
from inference_service.engine.sequence import Sequence
from shared.errors import Unavailable
from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Outbox = Callable[[list[Output]], None]
Command = Callable[[], None]


@dataclass(frozen=True)
class _Lane:
    """What serves one version."""

    tokenizer: Tokenizer
    context_length: int
    runner: Runner
    scheduler: Scheduler


class Engine:
    """Generates for many streams at once, with several versions side by side.

    The public methods may be called from any thread and return at once; what they ask for happens between two steps, in
    the order in which it was asked. `outbox` is called on the engine's thread, once a step, and must return at once.
    `failed` is called there once if the thread dies of an error; every open stream has ended with `Unavailable` then.
    """

    def __init__(self, slots: int, outbox: Outbox, failed: Callable[[], None]) -> None:
        self._slots = slots
        self._outbox = outbox
        self._failed = failed
        self._thread = threading.Thread(target=self._work, name="engine")
        # Guards the three below: they are all that other threads touch.
        self._changed = threading.Condition()
        self._inbox: list[Command] = []
        self._open: set[str] = set()
        self._closed: str | None = None
        # The engine thread's own.
        self._lanes: dict[int, _Lane] = {}
        self._outputs: list[Output] = []

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread and waits for it; open streams end with `Unavailable`."""
        self._close("The server is stopping.")
        self._thread.join()

    def add_version(self, version: int, model: GPT, tokenizer: Tokenizer) -> Future[None]:
        """Makes an evaluated model ready; the future tells when, or why not."""
        ready: Future[None] = Future()

        def add() -> None:
            try:
                runner = Runner(model, self._slots)
            except Exception as error:
                ready.set_exception(error)
                return
            self._lanes[version] = _Lane(tokenizer, model.config.context_length, runner, Scheduler(self._slots))
            ready.set_result(None)

        if not self._post(add):
            ready.set_exception(Unavailable("The engine has ended."))
        return ready

    def remove_version(self, version: int) -> Future[None]:
        """Frees the weights and the cache of a version without streams; the future tells when that is done."""
        gone: Future[None] = Future()

        def remove() -> None:
            assert not self._lanes[version].scheduler.sequences
            del self._lanes[version]
            gc.collect()
            mx.clear_cache()
            gone.set_result(None)

        if not self._post(remove):
            gone.set_result(None)
        return gone

    def submit(self, request: GenerationRequest) -> None:
        """Starts a stream on a version that was added; raises `Unavailable` where the engine does not run any more."""

        def add() -> None:
            lane = self._lanes[request.version]
            lane.scheduler.add(Sequence(request, lane.context_length, lane.tokenizer.end_token, lane.tokenizer.piece))

        if not self._post(add, opens=request.id):
            raise Unavailable(self._closed)

    def cancel(self, request_id: str) -> None:
        """Ends a stream with the reason CANCELLED; nothing happens where it has ended."""

        def cancel() -> None:
            for lane in self._lanes.values():
                for sequence in lane.scheduler.sequences:
                    if sequence.request.id == request_id:
                        self._end(lane, sequence, FinishReason.CANCELLED, time.monotonic())

        self._post(cancel)

    def _post(self, command: Command, opens: str | None = None) -> bool:
        with self._changed:
            if self._closed is None:
                self._inbox.append(command)
                if opens is not None:
                    self._open.add(opens)
                self._changed.notify()
            return self._closed is None

    def _close(self, reason: str) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify()

    def _work(self) -> None:
        try:
            while (commands := self._take_inbox()) is not None:
                for command in commands:
                    command()
                for lane in self._lanes.values():
                    self._step(lane)
                self._send()
        except BaseException:
            logger.exception("the engine failed")
            self._close("The engine failed and the server restarts; ask again in a moment.")
            self._end_open()
            self._failed()
        else:
            self._end_open()
        finally:
            # MLX aborts the process where it ends before this thread's stream does.
            self._lanes.clear()
            mx.clear_streams()

    def _take_inbox(self) -> list[Command] | None:
        """What was asked since; waits while there is nothing to do. None: the engine is to end."""
        busy = any(lane.scheduler.sequences for lane in self._lanes.values())
        with self._changed:
            self._changed.wait_for(lambda: busy or self._inbox or self._closed)
            commands, self._inbox = self._inbox, []
            return None if self._closed else commands

    def _step(self, lane: _Lane) -> None:
        now = time.monotonic()
        for sequence in lane.scheduler.sequences:
            if sequence.request.deadline is not None and sequence.request.deadline <= now:
                self._end(lane, sequence, FinishReason.DEADLINE, now)
        for sequence in lane.scheduler.admit():
            sequence.admitted_at = now
            self._emit(sequence, [Admitted(now)])
        plan = lane.scheduler.plan()
        if plan is not None:
            draws = lane.runner.run(plan)
            lane.scheduler.record(plan)
            now = time.monotonic()
            for sequence, draw in draws:
                self._accept(lane, sequence, draw, now)

    def _accept(self, lane: _Lane, sequence: Sequence, draw: Draw | None, now: float) -> None:
        events: list[Event]
        if draw is None:
            lane.runner.clear(lane.scheduler.slot_of(sequence))
            version = sequence.request.version
            events = [Failed(NotFinite(f"Version {version} computes no finite numbers for this text."))]
        else:
            events = sequence.accept(draw, now)
        self._emit(sequence, events)
        if isinstance(events[-1], Finished | Failed):
            lane.scheduler.remove(sequence)

    def _end(self, lane: _Lane, sequence: Sequence, reason: FinishReason, now: float) -> None:
        lane.scheduler.remove(sequence)
        self._emit(sequence, sequence.end(reason, now))

    def _emit(self, sequence: Sequence, events: list[Event]) -> None:
        self._outputs += [Output(sequence.request.id, event) for event in events]

    def _send(self) -> None:
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        with self._changed:
            self._open -= {output.request_id for output in outputs if isinstance(output.event, Finished | Failed)}
        self._outbox(outputs)

    def _end_open(self) -> None:
        self._send()
        error = Unavailable(self._closed)
        self._outbox([Output(request_id, Failed(error)) for request_id in self._open])
