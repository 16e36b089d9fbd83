"""Loads versions into the engine, examined on the way, and frees them."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import mlx.core as mx

from inference_service.engine.engine import Engine
from inference_service.versions.catalogue import Catalogue, refused
from inference_service.versions.gate import Refused, check_loss, read_content
from inference_service.versions.resident import Resident
from shared.decoding.decoder import Decoder
from shared.gpt.model import GPT
from shared.registry.manifest import VersionManifest
from shared.registry.registry import Registry
from shared.service import traces

logger = logging.getLogger(__name__)


class Loader:
    """Belongs to the event loop; files are read on one other thread, and the engine examines on its own.

    It begins to prepare decoders when it is made, so that the first version need not wait.
    """

    def __init__(
        self,
        registry: Registry,
        catalogue: Catalogue,
        engine: Engine,
        make_decoder: Callable[[GPT], Decoder],
        prepare_decoders: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._catalogue = catalogue
        self._engine = engine
        self._make_decoder = make_decoder
        # The engine frees versions in order, so the last one stands for all.
        self._freed: Future[None] | None = None
        self._helper = ThreadPoolExecutor(1, thread_name_prefix="loader")
        # A server that stops meanwhile waits for the compiler.
        self._helper.submit(prepare_decoders).add_done_callback(_report_failure)

    def close(self) -> None:
        """Reads nothing more, once the loads are cancelled."""
        # A thread must clear its MLX streams before it ends, or the end of the process may abort.
        self._helper.submit(mx.clear_streams)
        self._helper.shutdown(wait=False)

    async def load(self, manifest: VersionManifest, *, again: bool, instead_of: int | None) -> Resident:
        """Loads a version and notes that it may serve. It is not examined if a finding says so already.

        A refusal that is known counts as if the version `instead_of` were refused, and not at all if the version is to
        be examined `again`. Raises `FailedPrecondition` for it, `Refused` if the version must not serve, and as
        `read_content` and the engine do.
        """
        if self._freed is not None:
            # Its memory is needed.
            await asyncio.wait([asyncio.wrap_future(self._freed)])
        # Another server may refuse the version while it is examined here.
        known, at = self._catalogue.finding(manifest, instead_of), self._catalogue.looked_at
        if known is not None and known.refusal is not None:
            if not again:
                raise refused(manifest.version, known.sentence)
            known = None
        loop = asyncio.get_running_loop()
        with traces.span("read"):
            content = await loop.run_in_executor(self._helper, read_content, self._registry, manifest)
            decoder = await loop.run_in_executor(self._helper, self._make_decoder, content.model)
        windows = content.windows if known is None else ()
        tokenizer, context_length = content.tokenizer, content.model.config.context_length
        del content
        memory_bytes, weights = decoder.memory_bytes, decoder.weights
        ready = self._engine.add_version(manifest.version, decoder, tokenizer, context_length, windows)
        # It holds the weights.
        del decoder
        with traces.span("examine" if windows else "prepare"):
            loss = await asyncio.wrap_future(ready)
        if known is not None and known.loss is not None:
            return Resident(manifest, tokenizer, known.loss, memory_bytes, weights)
        try:
            check_loss(manifest, loss, weights)
        except Refused:
            await asyncio.wrap_future(self._engine.remove_version(manifest.version))
            raise
        self._catalogue.accept(manifest, loss, at)
        return Resident(manifest, tokenizer, loss, memory_bytes, weights)

    def free(self, number: int) -> None:
        """Frees a version without streams."""
        self._freed = self._engine.remove_version(number)


def _report_failure(preparing: Future[None]) -> None:
    # Making a decoder will fail, too, but there may be no version yet.
    if (error := preparing.exception()) is not None:
        logger.error("no version can be loaded: %s", error)
