"""The door of the server: answers checked requests, whatever face they came through, with events of the engine."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from inference_service.admission import Admission, Call, Ticket
from inference_service.client_limits import ClientLimits
from inference_service.codec import Codec
from inference_service.draft import Draft, Selection
from inference_service.engine.engine import Engine
from inference_service.engine.request import (
    Admitted,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
    NotFinite,
    Output,
    PromptRead,
    StepFailed,
)
from inference_service.generation_span import GenerationSpan, generation_span
from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from shared.errors import DeadlineExceeded, GptloopError, Unavailable
from shared.registry.manifest import VersionManifest
from shared.service.access.tokens import Caller
from shared.service.grpc_status import code_of
from shared.service.log_ids import note


class ClientLeft(asyncio.CancelledError):
    """The client has left while an event was being written: its call is cancelled."""


class Receiver(Protocol):
    """Takes the events of one request. A method may wait until its client has read; an exception ends the request."""

    async def started(self, request: GenerationRequest, resident: Resident) -> None:
        """The request has its slots."""

    async def prompt(self, read: PromptRead) -> None:
        """A part of the prompt was read, if the request asked for its log-probabilities."""

    async def delta(self, delta: Delta, index: int) -> None:
        """A sample has more text."""

    async def finished(self, finished: Finished, index: int) -> None:
        """A sample has ended."""


class Generations:
    """The requests that are being answered. Belongs to the event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        engine: Engine,
        residents: Residents,
        limits: ClientLimits,
        admission: Admission,
        codec: Codec,
        metrics: InferenceMetrics,
        version_failed: Callable[[int, GptloopError], None],
    ) -> None:
        self._catalogue = catalogue
        self._engine = engine
        self._residents = residents
        self._limits = limits
        self._admission = admission
        self._codec = codec
        self._metrics = metrics
        self._version_failed = version_failed
        self._outputs: dict[str, asyncio.Queue[Output]] = {}

    def deliver(self, outputs: list[Output]) -> None:
        """Passes the engine's events to their requests; drops the events of requests that have ended."""
        for output in outputs:
            if (queue := self._outputs.get(output.request_id)) is not None:
                queue.put_nowait(output)

    def fail_all(self, reason: str) -> None:
        """Ends every request with `Unavailable`."""
        self.deliver([Output(request_id, 0, Failed(Unavailable(reason))) for request_id in self._outputs])

    async def choose(self, selection: Selection) -> VersionManifest | None:
        """Returns the selected version, None for the serving one.

        Raises `NotFound` if it does not exist, and `Unavailable` for a label while the registry is empty.
        """
        if selection.version is not None:
            return await self._catalogue.manifest(selection.version)
        return None if selection.label is None else await self._catalogue.resolve(selection.label)

    def version(self, manifest: VersionManifest | None) -> AbstractAsyncContextManager[Resident]:
        """Keeps a chosen version in memory for requests that it shall answer; raises as `Residents.stream`."""
        return self._residents.stream(manifest)

    def most_samples(self, caller: Caller | None) -> int:
        """Returns how many samples a call may have at once."""
        return self._limits.most_samples(caller)

    def call(self, caller: Caller | None, samples: int) -> AbstractContextManager[Call]:
        """Encloses the requests of a call, which have at most this many samples at once.

        Raises `ResourceExhausted` if its client has reached a limit.
        """
        return self._limits.enter(caller, samples)

    async def run(self, draft: Draft, receiver: Receiver, caller: Caller | None) -> str:
        """Answers a checked request with the version that it selects, as `run_on`; raises as `call`."""
        with self.call(caller, draft.options.samples) as call:
            async with self.version(await self.choose(draft.selection)) as resident:
                return await self.run_on(resident, draft, receiver, call)

    async def run_on(self, resident: Resident, draft: Draft, receiver: Receiver, call: Call) -> str:
        """Answers a checked request of a call with a version; returns the finish reason of its last sample.

        If the task is cancelled, the slots are free within one step.
        """
        number = resident.manifest.version
        note(version=number, run=resident.manifest.run)
        with (
            _ending(partial(self._metrics.answered, number)) as end,
            generation_span(draft, number) as span,
            self._admission.enter(draft.options.samples, call) as ticket,
        ):
            end.reason = await self._answer(draft, resident, receiver, ticket, span)
        return end.reason

    async def _answer(
        self, draft: Draft, resident: Resident, receiver: Receiver, ticket: Ticket, span: GenerationSpan
    ) -> str:
        """Answers a request with a version; returns the finish reason of its last sample."""
        seed = secrets.randbits(64) if draft.seed is None else draft.seed
        request = await self._codec.complete(draft, resident, seed)
        ticket.add_prompt_tokens(len(request.prompt))
        self._metrics.accepted(len(request.prompt))
        ticket.charge(len(request.prompt))
        queue = self._outputs[request.id] = asyncio.Queue()
        try:
            self._engine.submit(request)
            return await self._relay(queue, request, resident, receiver, ticket, span)
        finally:
            del self._outputs[request.id]
            self._engine.cancel(request.id)

    async def _relay(
        self,
        queue: asyncio.Queue[Output],
        request: GenerationRequest,
        resident: Resident,
        receiver: Receiver,
        ticket: Ticket,
        span: GenerationSpan,
    ) -> str:
        """Passes the events of a request on until its last sample has ended; raises the error of a failed sample.

        A waiting request gets no event, so that its client can retry if the server stops.
        """
        record = self._metrics.tokens_of(request.version, request.arrived)
        remaining = request.samples
        admitted = False
        ended = ""
        while remaining:
            for output in await _take(queue):
                match output.event:
                    case Admitted():
                        ticket.admitted()
                        admitted = True
                        await receiver.started(request, resident)
                    case Finished() if not admitted:
                        raise DeadlineExceeded("The deadline passed while the request waited for a slot.")
                    case PromptRead() as read:
                        await receiver.prompt(read)
                    case Delta() as delta:
                        ticket.charge(len(delta.times))
                        note(generated_tokens=len(delta.times))
                        record(output.index, delta.times)
                        await receiver.delta(delta, output.index)
                    case Finished() as finished:
                        remaining -= 1
                        if output.index == 0:
                            self._metrics.cached(finished.cached_prompt_tokens)
                        ended = finished.reason.name
                        span.finished(request, finished, output.index)
                        await receiver.finished(finished, output.index)
                    case Failed(error):
                        if isinstance(error, NotFinite | StepFailed):
                            self._version_failed(request.version, error)
                        raise error
        return ended


@dataclass
class _End:
    reason: str = "internal"


@contextmanager
def _ending(report: Callable[[str], None]) -> Iterator[_End]:
    """Reports how a call ended: the reason set inside the block, or the status code of its error."""
    end = _End()
    try:
        yield end
    except asyncio.CancelledError:
        end.reason = "cancelled"
        raise
    except GptloopError as error:
        end.reason = code_of(error).name
        raise
    finally:
        report(end.reason)


async def _take(queue: asyncio.Queue[Output]) -> list[Output]:
    """Returns the events in the queue, at least one; merges the deltas of each sample, so slow readers catch up."""
    taken: list[Output] = [await queue.get()]
    while not queue.empty():
        taken.append(queue.get_nowait())
    deltas: dict[int, list[Delta]] = {}
    for output in taken:
        if isinstance(output.event, Delta):
            deltas.setdefault(output.index, []).append(output.event)
    merged: list[Output] = []
    for output in taken:
        if not isinstance(output.event, Delta):
            merged.append(output)
        elif (waiting := deltas.pop(output.index, None)) is not None:
            merged.append(Output(output.request_id, output.index, Delta.joined(waiting)))
    return merged
