"""Texts to tokens and back for clients, beside the streams and out of their way."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from inference_service.engine.request import GenerationRequest
from inference_service.grpc.translate import Draft
from inference_service.versions.resident import Resident
from shared.errors import InvalidArgument, ResourceExhausted
from shared.pb.inference.v1 import inference_pb2 as pb

# Clients take answers of 4 MiB, and an answer is at most three times as long as the text: a token stands for at least
# one byte and has at most three in a message, and what replaces a byte that is no text has three.
MAX_TEXT_BYTES = 1 << 20
MAX_TOKENS = 1 << 20
MAX_WAITING = 64
_AGAIN_AFTER_S = 1.0
# Of the niceness that Linux gives each thread, so that the engine's comes first.
_NICENESS = 10

_T = TypeVar("_T")


class Codec:
    """Encodes and decodes on one thread, one call at a time; at most `MAX_WAITING` wait. Prompts have a thread of their
    own, so that none waits behind a long text, and `Admission` bounds them. Belongs to the event loop."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codec", initializer=_step_back)
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._waiting = 0

    async def complete(self, draft: Draft, resident: Resident, seed: int) -> GenerationRequest:
        """The request on a version; raises `InvalidArgument` if it does not fit."""
        return await asyncio.get_running_loop().run_in_executor(
            self._prompts, draft.complete, resident.manifest.version, resident.tokenizer, resident.context_length, seed
        )

    async def tokenize(self, message: pb.TokenizeRequest, resident: Resident) -> pb.TokenizeResponse:
        """The tokens of a text; raises `InvalidArgument` if it is too long."""
        version = resident.manifest.version
        size_bytes = len(message.text.encode())
        if size_bytes > MAX_TEXT_BYTES:
            raise InvalidArgument(f"text has {size_bytes} bytes, but may have at most {MAX_TEXT_BYTES}.")
        return await self._run(
            lambda: pb.TokenizeResponse(token_ids=resident.tokenizer.encode(message.text), model_version=version)
        )

    async def detokenize(self, message: pb.DetokenizeRequest, resident: Resident) -> pb.DetokenizeResponse:
        """The text of tokens; raises `InvalidArgument` if they are too many, or one does not exist."""
        version, tokenizer = resident.manifest.version, resident.tokenizer
        if len(message.token_ids) > MAX_TOKENS:
            raise InvalidArgument(
                f"token_ids holds {len(message.token_ids)} tokens, but may hold at most {MAX_TOKENS}."
            )

        def decode() -> pb.DetokenizeResponse:
            tokens = np.array(message.token_ids, dtype=np.int64)
            strange = tokens[(tokens < 0) | (tokens >= tokenizer.vocabulary_size)]
            if len(strange):
                raise InvalidArgument(
                    f"token_ids holds {strange[0]}, but version {version} has the tokens 0 to "
                    f"{tokenizer.vocabulary_size - 1}."
                )
            size_bytes = int(tokenizer.byte_lengths[tokens].sum())
            if size_bytes > MAX_TEXT_BYTES:
                raise InvalidArgument(
                    f"The tokens stand for {size_bytes} bytes of text, but may stand for at most {MAX_TEXT_BYTES}."
                )
            return pb.DetokenizeResponse(text=tokenizer.decode(tokens.tolist()), model_version=version)

        return await self._run(decode)

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._waiting >= MAX_WAITING:
            raise ResourceExhausted(
                f"{self._waiting} texts wait already, which is the limit; ask again in {_AGAIN_AFTER_S:g} s.",
                _AGAIN_AFTER_S,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1


def _step_back() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
