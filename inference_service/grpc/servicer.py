"""The service that clients call over gRPC: translates messages into requests, and events into messages."""

from typing import Any

import grpc.aio

from inference_service.codec import Codec
from inference_service.engine.request import Delta, Finished, GenerationRequest, PromptRead
from inference_service.generation import ClientLeft, Generations
from inference_service.grpc import translate
from inference_service.grpc.translate import selection_from_pb
from inference_service.versions.catalogue import Catalogue
from inference_service.versions.resident import Resident
from inference_service.versions.residents import Residents
from inference_service.write_timeouts import WriteTimeouts
from shared.pb.inference.v1 import inference_pb2 as pb
from shared.pb.inference.v1 import inference_pb2_grpc
from shared.registry.policy import labels_of
from shared.service.access.token_interceptor import current_caller

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """`InferenceService`. Belongs to the event loop."""

    def __init__(
        self,
        generations: Generations,
        catalogue: Catalogue,
        residents: Residents,
        codec: Codec,
        write_timeouts: WriteTimeouts,
    ) -> None:
        self._generations = generations
        self._catalogue = catalogue
        self._residents = residents
        self._codec = codec
        self._write_timeouts = write_timeouts

    async def Generate(self, message: pb.GenerateRequest, context: Context) -> str:  # noqa: N802
        """Streams one generation; returns the finish reason of its last sample. gRPC may cancel it at any `await`."""
        caller = current_caller()
        draft = translate.draft_from_pb(message, context.time_remaining(), self._generations.most_samples(caller))
        return await self._generations.run(draft, _Messages(context, self._write_timeouts), caller)

    async def Tokenize(self, message: pb.TokenizeRequest, context: object) -> pb.TokenizeResponse:  # noqa: N802
        """Encodes a text with the tokenizer of a version, which stays in memory for the call."""
        with self._generations.call(current_caller(), 0) as call:
            chosen = await self._generations.choose(selection_from_pb(message.model))
            async with self._generations.version(chosen) as resident:
                answer = await self._codec.tokenize(message, resident)
            call.charge(len(answer.token_ids))
            return answer

    async def Detokenize(self, message: pb.DetokenizeRequest, context: object) -> pb.DetokenizeResponse:  # noqa: N802
        """Decodes tokens with the tokenizer of a version, which stays in memory for the call."""
        with self._generations.call(current_caller(), 0) as call:
            chosen = await self._generations.choose(selection_from_pb(message.model))
            async with self._generations.version(chosen) as resident:
                answer = await self._codec.detokenize(message, resident)
            call.charge(len(message.token_ids))
            return answer

    async def GetModel(self, message: pb.GetModelRequest, context: object) -> pb.GetModelResponse:  # noqa: N802
        """Describes a version, in memory or not."""
        chosen = await self._generations.choose(selection_from_pb(message.model))
        manifest = chosen or (await self._residents.await_serving()).manifest
        await self._catalogue.look()
        number, catalogue = manifest.version, self._catalogue
        return translate.model_to_pb(manifest, labels_of(number, catalogue.labels()), catalogue.evaluation(number))


class _Messages:
    """Writes the events of a request as messages.

    Raises `ResourceExhausted` if the client does not read them in time, and `ClientLeft`.
    """

    def __init__(self, context: Context, write_timeouts: WriteTimeouts) -> None:
        self._context = context
        self._write_timeouts = write_timeouts

    async def started(self, request: GenerationRequest, resident: Resident) -> None:
        await self._write(translate.started_to_pb(request, resident))

    async def prompt(self, read: PromptRead) -> None:
        await self._write(translate.prompt_to_pb(read))

    async def delta(self, delta: Delta, index: int) -> None:
        await self._write(translate.delta_to_pb(delta, index))

    async def finished(self, finished: Finished, index: int) -> None:
        await self._write(translate.finished_to_pb(finished, index))

    async def _write(self, message: pb.GenerateResponse) -> None:
        try:
            async with self._write_timeouts.limit():
                await self._context.write(message)
        except grpc.aio.InternalError as error:
            raise ClientLeft from error
