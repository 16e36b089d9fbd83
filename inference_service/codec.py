"""Encodes and decodes text for clients, beside the streams and without slowing them."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from inference_service.draft import Draft
from inference_service.engine.request import GenerationRequest
from inference_service.versions.resident import Resident
from shared.errors import InvalidArgument, ResourceExhausted
from shared.pb.inference.v1 import inference_pb2 as pb

# Clients accept answers of 4 MiB, and an answer is at most three times as long as its request: a token stands for at
# least one byte and takes at most three bytes in a message, and U+FFFD, which replaces an invalid byte, takes three.
MAX_TEXT_BYTES = 1 << 20
MAX_TOKENS = 1 << 20
MAX_WAITING = 64
_RETRY_AFTER_S = 1.0
# Linux has a niceness per thread; this one lets the engine's thread run first.
_NICENESS = 10

_T = TypeVar("_T")


class Codec:
    """Encodes and decodes on one thread, one call at a time; at most `MAX_WAITING` calls wait.

    Prompts use a second thread, so that none waits behind a long text; `Admission` limits them. Belongs to the event
    loop.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="codec", initializer=_lower_priority)
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._waiting = 0

    async def complete(self, draft: Draft, resident: Resident, seed: int) -> GenerationRequest:
        """Encodes the prompt of a request for a version; raises `InvalidArgument` if the request does not fit."""
        return await asyncio.get_running_loop().run_in_executor(
            self._prompts, draft.complete, resident.manifest.version, resident.tokenizer, resident.context_length, seed
        )

    async def tokenize(self, message: pb.TokenizeRequest, resident: Resident) -> pb.TokenizeResponse:
        """Encodes a text; raises `InvalidArgument` if it is too long."""
        version = resident.manifest.version
        size_bytes = len(message.text.encode())
        if size_bytes > MAX_TEXT_BYTES:
            raise InvalidArgument(f"text has {size_bytes} bytes, but the limit is {MAX_TEXT_BYTES}.")
        return await self._run(
            lambda: pb.TokenizeResponse(token_ids=resident.tokenizer.encode(message.text), model_version=version)
        )

    async def detokenize(self, message: pb.DetokenizeRequest, resident: Resident) -> pb.DetokenizeResponse:
        """Decodes tokens; raises `InvalidArgument` if there are too many, or if one does not exist."""
        version, tokenizer = resident.manifest.version, resident.tokenizer
        if len(message.token_ids) > MAX_TOKENS:
            raise InvalidArgument(f"token_ids has {len(message.token_ids)} tokens, but the limit is {MAX_TOKENS}.")

        def decode() -> pb.DetokenizeResponse:
            tokens = np.array(message.token_ids, dtype=np.int64)
            unknown = tokens[(tokens < 0) | (tokens >= tokenizer.vocabulary_size)]
            if len(unknown):
                raise InvalidArgument(
                    f"token_ids contains {unknown[0]}, but version {version} has the tokens 0 to "
                    f"{tokenizer.vocabulary_size - 1}."
                )
            size_bytes = int(tokenizer.byte_lengths[tokens].sum())
            if size_bytes > MAX_TEXT_BYTES:
                raise InvalidArgument(
                    f"token_ids stands for {size_bytes} bytes of text, but the limit is {MAX_TEXT_BYTES}."
                )
            return pb.DetokenizeResponse(text=tokenizer.decode(tokens.tolist()), model_version=version)

        return await self._run(decode)

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._waiting >= MAX_WAITING:
            raise ResourceExhausted(
                f"{self._waiting} texts are waiting already, which is the limit; retry in {_RETRY_AFTER_S:g} s.",
                _RETRY_AFTER_S,
            )
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        finally:
            self._waiting -= 1


def _lower_priority() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
