"""The service that clients call: turns messages into requests, and the engine's events into messages."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import grpc.aio

from inference_service.admission import Admission, Ticket
from inference_service.codec import Codec
from inference_service.engine.engine import Engine
from inference_service.engine.request import (
    Admitted,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
    NotFinite,
    Output,
    StepFailed,
)
from inference_service.grpc import translate
from inference_service.grpc.translate import Draft, Selection, selection_from_pb
from inference_service.metrics import InferenceMetrics
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from inference_service.write_timeouts import WriteTimeouts
from shared.errors import DeadlineExceeded, GptloopError, Unavailable
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.registry.manifest import VersionManifest
from shared.registry.policy import labels_of
from shared.service.grpc_status import code_of

Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`InferenceService`. Belongs to the event loop."""

    def __init__(
        self,
        catalogue: Catalogue,
        engine: Engine,
        residents: Residents,
        admission: Admission,
        codec: Codec,
        metrics: InferenceMetrics,
        version_failed: Callable[[int, GptloopError], None],
        *,
        slots: int,
        write_timeouts: WriteTimeouts,
    ) -> None:
        self._catalogue = catalogue
        self._engine = engine
        self._residents = residents
        self._admission = admission
        self._codec = codec
        self._metrics = metrics
        self._version_failed = version_failed
        self._slots = slots
        self._write_timeouts = write_timeouts
        self._outputs: dict[str, asyncio.Queue[Output]] = {}

    def deliver(self, outputs: list[Output]) -> None:
        """Passes the engine's events to their requests; drops the events of requests that have ended."""
        for output in outputs:
            if (queue := self._outputs.get(output.request_id)) is not None:
                queue.put_nowait(output)

    def fail_all(self, reason: str) -> None:
        """Ends every request with `Unavailable`."""
        self.deliver([Output(request_id, 0, Failed(Unavailable(reason))) for request_id in self._outputs])

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> str:  # noqa: N802
        """Streams one generation; returns the finish reason of its last sample. gRPC may cancel it at any `await`."""
        draft = translate.draft_from_pb(message, context.time_remaining(), self._slots)
        return await self._generate(draft, context)

    async def Tokenize(self, message: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:  # noqa: N802
        """Encodes a text with the tokenizer of a version, which stays in memory for the call."""
        async with self._residents.stream(await self._choose(selection_from_pb(message.model))) as resident:
            return await self._codec.tokenize(message, resident)

    async def Detokenize(self, message: pb.DetokenizeRequest, context: object) -> pb.DetokenizeResponse:  # noqa: N802
        """Decodes tokens with the tokenizer of a version, which stays in memory for the call."""
        async with self._residents.stream(await self._choose(selection_from_pb(message.model))) as resident:
            return await self._codec.detokenize(message, resident)

    async def GetModel(self, message: pb.GetModelRequest, context: object) -> pb.GetModelResponse:  # noqa: N802
        """Describes a version, in memory or not."""
        chosen = await self._choose(selection_from_pb(message.model))
        manifest = chosen or (await self._residents.await_serving()).manifest
        await self._catalogue.look()
        number, catalogue = manifest.version, self._catalogue
        return translate.model_to_pb(manifest, labels_of(number, catalogue.labels()), catalogue.evaluation(number))

    async def _generate(self, draft: Draft, context: Context) -> str:
        """Answers a checked request; returns the finish reason of its last sample."""
        async with self._residents.stream(await self._choose(draft.selection)) as resident:
            with (
                _ending(partial(self._metrics.answered, resident.manifest.version)) as end,
                self._admission.enter(draft.options.samples) as ticket,
            ):
                end.reason = await self._answer(draft, resident, context, ticket)
            return end.reason

    async def _answer(self, draft: Draft, resident: Resident, context: Context, ticket: Ticket) -> str:
        """Answers a request with a version; returns the finish reason of its last sample."""
        manifest = resident.manifest
        seed = secrets.randbits(64) if draft.seed is None else draft.seed
        request = await self._codec.complete(draft, resident, seed)
        ticket.add_prompt_tokens(len(request.prompt))
        self._metrics.accepted(len(request.prompt))
        queue = self._outputs[request.id] = asyncio.Queue()
        try:
            self._engine.submit(request)
            started = translate.started_to_pb(request, manifest.digest)
            return await self._relay(queue, request, started, context, ticket)
        finally:
            del self._outputs[request.id]
            self._engine.cancel(request.id)

    async def _relay(
        self,
        queue: asyncio.Queue[Output],
        request: GenerationRequest,
        started: pb.GenerateResponse,
        context: Context,
        ticket: Ticket,
    ) -> str:
        """Writes the events of a request until its last sample has ended; raises the error of a failed sample.

        A waiting request gets no message, so that its client can retry if the server stops.
        """
        last_at: dict[int, float] = {}
        remaining = request.samples
        admitted = False
        ended = ""
        while remaining:
            for output in await _take(queue):
                match output.event:
                    case Admitted():
                        ticket.admitted()
                        admitted = True
                        await self._write(context, started)
                    case Finished() if not admitted:
                        raise DeadlineExceeded("The deadline passed while the request waited for a slot.")
                    case Delta() as delta:
                        for at in delta.times:
                            self._metrics.token(request.version, request.arrived, last_at.get(output.index), at)
                            last_at[output.index] = at
                        await self._write(context, translate.delta_to_pb(delta, output.index))
                    case Finished() as finished:
                        remaining -= 1
                        if output.index == 0:
                            self._metrics.cached(finished.cached_prompt_tokens)
                        ended = finished.reason.name
                        await self._write(context, translate.finished_to_pb(finished, output.index))
                    case Failed(error):
                        if isinstance(error, NotFinite | StepFailed):
                            self._version_failed(request.version, error)
                        raise error
        return ended

    async def _write(self, context: Context, message: pb.GenerateResponse) -> None:
        """Writes a message; raises `ResourceExhausted` if the client does not read it in time."""
        async with self._write_timeouts.limit():
            await context.write(message)

    async def _choose(self, selection: Selection) -> VersionManifest | None:
        """Returns the selected version, None for the serving one.

        Raises `NotFound` if it does not exist, and `Unavailable` for a label while the registry is empty.
        """
        if selection.version is not None:
            return await self._catalogue.manifest(selection.version)
        return None if selection.label is None else await self._catalogue.resolve(selection.label)


@dataclass
class _End:
    reason: str = "internal"


@contextmanager
def _ending(report: Callable[[str], None]) -> Iterator[_End]:
    """Reports how a call ended: the reason set inside the block, or the status code of its error."""
    end = _End()
    try:
        yield end
    except (asyncio.CancelledError, grpc.aio.InternalError):
        # InternalError: the client left while a message was being written.
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
