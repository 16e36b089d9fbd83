"""The service that clients call: from a message to the engine, and from its events back to messages."""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio

from inference_service.admission import Admission, Place
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
from inference_service.grpc.translate import Draft, Selection
from inference_service.metrics import InferenceMetrics
from inference_service.patience import Patience
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from shared.errors import DeadlineExceeded, GptloopError, Unavailable
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.registry.manifest import VersionManifest
from shared.registry.policy import labels_of
from shared.service.grpc_status import code_of


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
        patience: Patience,
    ) -> None:
        self._catalogue = catalogue
        self._engine = engine
        self._residents = residents
        self._admission = admission
        self._codec = codec
        self._metrics = metrics
        self._version_failed = version_failed
        self._slots = slots
        self._patience = patience
        self._outputs: dict[str, asyncio.Queue[Output]] = {}

    def deliver(self, outputs: list[Output]) -> None:
        """Gives the engine's events to their requests; those of a request that is gone go nowhere."""
        for output in outputs:
            if (queue := self._outputs.get(output.request_id)) is not None:
                queue.put_nowait(output)

    def fail_all(self, reason: str) -> None:
        """Ends every request with `Unavailable`."""
        self.deliver([Output(request_id, 0, Failed(Unavailable(reason))) for request_id in self._outputs])

    async def Generate(self, message: pb.GenerateRequest, context: Any) -> str:  # noqa: N802
        """Streams one generation; returns how its last sample ended. gRPC cancels a coroutine wherever it stands."""
        draft = translate.draft_from_pb(message, context.time_remaining(), self._slots)
        return await self._generate(draft, context)

    async def Tokenize(self, message: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Encodes a text with the tokenizer of a version, which is in memory meanwhile."""
        chosen = await self._choose(translate.selection_from_pb(message.model))
        async with self._residents.stream(chosen) as resident:
            return await self._codec.tokenize(message, resident)

    async def Detokenize(self, message: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:  # noqa: N802
        """Decodes tokens with the tokenizer of a version, which is in memory meanwhile."""
        chosen = await self._choose(translate.selection_from_pb(message.model))
        async with self._residents.stream(chosen) as resident:
            return await self._codec.detokenize(message, resident)

    async def GetModel(self, message: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """Describes a version, which need not be in memory."""
        manifest = (
            await self._choose(translate.selection_from_pb(message.model))
            or (await self._residents.await_serving()).manifest
        )
        await self._catalogue.look()
        return translate.model_to_pb(manifest, labels_of(manifest.version, self._catalogue.labels()))

    async def _generate(self, draft: Draft, context: Any) -> str:
        """Answers a checked request; how its last sample ended."""
        chosen = await self._choose(draft.selection)
        async with self._residents.stream(chosen) as resident:
            with (
                _ending(partial(self._metrics.answered, resident.manifest.version)) as end,
                self._admission.enter(draft.options.samples) as place,
            ):
                end.reason = await self._answer(draft, resident, context, place)
            return end.reason

    async def _answer(self, draft: Draft, resident: Resident, context: Any, place: Place) -> str:
        """Answers a request with a version; how its last sample ended."""
        manifest = resident.manifest
        seed = secrets.randbits(64) if draft.seed is None else draft.seed
        request = await self._codec.complete(draft, resident, seed)
        place.weigh(len(request.prompt))
        self._metrics.accepted(len(request.prompt))
        queue = self._outputs[request.id] = asyncio.Queue()
        try:
            self._engine.submit(request)
            started = translate.started_to_pb(request, manifest.digest)
            return await self._relay(queue, request, started, context, place)
        finally:
            del self._outputs[request.id]
            self._engine.cancel(request.id)

    async def _relay(
        self,
        queue: asyncio.Queue[Output],
        request: GenerationRequest,
        started: pb.GenerateResponse,
        context: Any,
        place: Place,
    ) -> str:
        """Writes a request's events until the end of its last sample; raises the error of one that failed.

        A request that waits gets no message, so that a client may make its call again if it ends.
        """
        last_at: dict[int, float] = {}
        remaining = request.samples
        admitted = False
        ended = ""
        while remaining:
            for output in await _take(queue):
                match output.event:
                    case Admitted():
                        place.admitted()
                        admitted = True
                        await self._write(context, started)
                    case Finished() if not admitted:
                        raise DeadlineExceeded("The deadline passed before the request had its turn.")
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

    async def _write(self, context: Any, message: pb.GenerateResponse) -> None:
        """Writes a message as soon as the client takes it; raises `ResourceExhausted` where it does not."""
        async with self._patience.with_reader():
            await context.write(message)

    async def _choose(self, selection: Selection) -> VersionManifest | None:
        """The version that a call asks for, None for the serving one.

        Raises `NotFound` on one that does not exist and `Unavailable` on a label while there is no version at all.
        """
        if selection.version is not None:
            return await self._catalogue.manifest(selection.version)
        return None if selection.label is None else await self._catalogue.resolve(selection.label)


@dataclass
class _End:
    reason: str = "internal"


@contextmanager
def _ending(tell: Callable[[str], None]) -> Iterator[_End]:
    """Tells how a call ended: as is noted within, or by the status code of its error."""
    end = _End()
    try:
        yield end
    except (asyncio.CancelledError, grpc.aio.InternalError):
        # The latter is a client that left in the very moment in which a message was written.
        end.reason = "cancelled"
        raise
    except GptloopError as error:
        end.reason = code_of(error).name
        raise
    finally:
        tell(end.reason)


async def _take(queue: asyncio.Queue[Output]) -> list[Output]:
    """What has come since, at least one event. What a slow reader has not taken yet becomes one delta a sample."""
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
        elif (together := deltas.pop(output.index, None)) is not None:
            merged.append(Output(output.request_id, output.index, Delta.joined(together)))
    return merged
