"""The service that clients call: from a message to the engine, and from its events back to messages."""

import asyncio
import secrets
from typing import Any

from inference_service import translate
from inference_service.admission import Admission, Place
from inference_service.engine.engine import Engine
from inference_service.engine.request import Admitted, Delta, Event, Failed, Finished, Output
from inference_service.hotload import HotLoader
from inference_service.metrics import InferenceMetrics
from inference_service.translate import Selection
from shared.errors import GptloopError, Unavailable
from shared.gpt.tokenizer import Tokenizer
from shared.grpc_status import code_of
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.registry.manifest import VersionManifest
from shared.registry.store import Registry


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`InferenceService`. Belongs to the event loop."""

    def __init__(
        self,
        registry: Registry,
        engine: Engine,
        versions: HotLoader,
        admission: Admission,
        metrics: InferenceMetrics,
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._versions = versions
        self._admission = admission
        self._metrics = metrics
        self._events: dict[str, asyncio.Queue[Event]] = {}

    def deliver(self, outputs: list[Output]) -> None:
        """Gives the engine's events to their streams; those of a stream that is gone go nowhere."""
        for output in outputs:
            if (events := self._events.get(output.request_id)) is not None:
                events.put_nowait(output.event)

    def cancel_all(self) -> None:
        """Ends every stream with the reason CANCELLED."""
        for request_id in self._events:
            self._engine.cancel(request_id)

    async def Generate(self, message: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        """Streams one generation. A coroutine, not a generator: so gRPC cancels it wherever it stands."""
        ended = "internal"
        try:
            with self._admission.enter() as place:
                ended = (await self._generate(message, context, place)).reason.name
        except asyncio.CancelledError:
            ended = "cancelled"
            raise
        except GptloopError as error:
            ended = code_of(error).name
            raise
        finally:
            self._metrics.ended(ended)

    async def Tokenize(self, message: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:  # noqa: N802
        """Encodes a text with the tokenizer of a version, which need not be in memory."""
        manifest = await self._choose(translate.read_selection(message.model)) or self._serving()
        resident = self._versions.resident(manifest.version)
        if resident is not None:
            tokenizer = resident.tokenizer
        else:
            path = self._registry.version_directory(manifest.version) / "tokenizer.json"
            tokenizer = await asyncio.to_thread(Tokenizer.load, path)
        token_ids = await asyncio.to_thread(tokenizer.encode, message.text)
        return pb.TokenizeResponse(token_ids=token_ids, model_version=manifest.version)

    async def GetModel(self, message: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:  # noqa: N802
        """Describes a version, which need not be in memory."""
        manifest = await self._choose(translate.read_selection(message.model)) or self._serving()
        labels = await asyncio.to_thread(self._registry.labels)
        return translate.write_model(
            manifest, [label for label, number in labels.items() if number == manifest.version]
        )

    async def _generate(self, message: pb.GenerateRequest, context: Any, place: Place) -> Finished:
        draft = translate.read_generate(message, context.time_remaining())
        async with self._versions.stream(await self._choose(draft.selection)) as resident:
            seed = secrets.randbits(64) if draft.seed is None else draft.seed
            # On another thread: a long text takes a while to encode.
            request = await asyncio.to_thread(
                draft.complete, resident.manifest.version, resident.tokenizer, resident.context_length, seed
            )
            place.weigh(len(request.prompt))
            self._metrics.accepted(len(request.prompt))
            events = self._events[request.id] = asyncio.Queue()
            try:
                await context.write(translate.write_started(request))
                self._engine.submit(request)
                return await self._relay(events, request.arrived, context, place)
            finally:
                del self._events[request.id]
                self._engine.cancel(request.id)

    async def _relay(self, events: asyncio.Queue[Event], arrived: float, context: Any, place: Place) -> Finished:
        """Writes a stream's events until its end; raises the error of one that failed."""
        last_at = None
        admitted = False
        try:
            while True:
                match await events.get():
                    case Admitted():
                        place.leave()
                        admitted = True
                        self._metrics.active_streams.inc()
                    case Delta() as delta:
                        for _ in delta.draws:
                            self._metrics.token(arrived, last_at, delta.at)
                            last_at = delta.at
                        await context.write(translate.write_delta(delta))
                    case Finished() as finished:
                        await context.write(translate.write_finished(finished))
                        return finished
                    case Failed(error):
                        raise error
        finally:
            if admitted:
                self._metrics.active_streams.dec()

    async def _choose(self, selection: Selection) -> VersionManifest | None:
        """The version that a call asks for, None for the serving one.

        Raises `NotFound` on one that does not exist and `Unavailable` on a label while there is no version at all.
        """
        if selection.version is not None:
            return await asyncio.to_thread(self._registry.version, selection.version)
        if selection.label is None:
            return None
        if not await asyncio.to_thread(self._registry.versions):
            raise Unavailable(f"The label {selection.label!r} names no version yet: the registry is empty.")
        return await asyncio.to_thread(self._registry.resolve, selection.label)

    def _serving(self) -> VersionManifest:
        if self._versions.serving is None:
            raise Unavailable("No version serves yet: the first one does a moment after training has published it.")
        return self._versions.serving.manifest
