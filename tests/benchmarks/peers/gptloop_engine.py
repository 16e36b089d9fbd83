"""This project's engine with its thread and its outbox, in this process, without gRPC."""

import os
import time
from queue import SimpleQueue
from typing import Any

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT
from tests.benchmarks.worker import resident_peak

# As in the server.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_DEVICE = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")

from inference_service.engine.engine import Engine  # noqa: E402
from inference_service.engine.request import Delta, Failed, Finished, GenerationRequest, Output  # noqa: E402
from inference_service.settings import Settings, prefill_tokens_on, read_settings, weights_on  # noqa: E402
from shared.decoding.decoder import DecoderFactory  # noqa: E402
from shared.decoding.sampling import SamplingParameters  # noqa: E402
from shared.decoding.weight_format import WeightFormat  # noqa: E402
from shared.version_format import read_model, read_tokenizer  # noqa: E402
from tests.benchmarks.checkpoint import VERSION  # noqa: E402
from tests.benchmarks.closed_loop import ClosedLoop  # noqa: E402
from tests.benchmarks.setup import Setup  # noqa: E402


class Generation:
    """Generates for all rows at once. `variant` "" draws with the server's defaults, "greedy" takes the likeliest
    token, and "fp32" has weights in fp32, on a CPU."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        given = Setup.from_dict(setup)
        self._work = ClosedLoop(**work)
        self._sampling = SamplingParameters(temperature=0.0) if variant == "greedy" else SamplingParameters()
        self._prompts = self._work.prompts()
        checkpoint, config = given.checkpoint, given.checkpoint.config
        model = read_model(checkpoint.version, config)
        weights = (
            WeightFormat.FP32 if variant == "fp32" else weights_on(_DEVICE.backend, read_settings(os.environ).weights)
        )
        decoder = DecoderFactory(given.slots, given.threads, _DEVICE.cache, weights).make(model)
        tokenizer = read_tokenizer(checkpoint.version)
        # The engine's thread puts the events of a step into this queue; this thread stands for the server's event loop.
        self._outputs: SimpleQueue[list[Output]] = SimpleQueue()
        prefill_tokens = prefill_tokens_on(_DEVICE.backend)
        prefix_bytes = Settings.prefix_cache_mib << 20
        self._engine = Engine(given.slots, prefill_tokens, prefix_bytes, self._outputs.put, lambda: None)
        self._engine.start()
        self._engine.add_version(VERSION, decoder, tokenizer, config.context_length).result()

    def step(self) -> None:
        tokens: dict[str, int] = {}
        for row, prompt in enumerate(next(self._prompts)):
            request = GenerationRequest(
                id=str(row),
                version=VERSION,
                prompt=tuple(prompt),
                seed=row,
                max_tokens=self._work.output_tokens,
                arrived=time.monotonic(),
                sampling=self._sampling,
                ignore_eos=True,
            )
            tokens[request.id] = 0
            self._engine.submit(request)
        unfinished = len(tokens)
        while unfinished:
            for output in self._outputs.get():
                match output.event:
                    case Delta() as delta:
                        tokens[output.request_id] += len(delta.draws)
                    case Finished():
                        unfinished -= 1
                    case Failed(error):
                        raise error
        self._work.check(list(tokens.values()))

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_peak()

    def end(self) -> None:
        self._engine.stop()
