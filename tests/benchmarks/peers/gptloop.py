"""This project, with the classes that its services use."""

import time
from typing import Any

import numpy as np

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT
from tests.benchmarks.worker import resident_peak

# As in the services.
_ACCELERATOR = accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")

import mlx.core as mx  # noqa: E402

from inference_service.engine.request import GenerationRequest, plain_draw  # noqa: E402
from inference_service.engine.runner import NextTokens, Runner  # noqa: E402
from inference_service.engine.scheduler import Scheduler  # noqa: E402
from inference_service.engine.sequence import Sequence  # noqa: E402
from shared.decoding.cuda.decoder import CudaDecoder  # noqa: E402
from shared.decoding.decoder import Decoder, DecoderFactory  # noqa: E402
from shared.decoding.mlx_decoder import MlxDecoder, ProgramCache  # noqa: E402
from shared.decoding.sampling import SamplingParameters  # noqa: E402
from shared.decoding.spans import SPAN_TOKENS  # noqa: E402
from shared.decoding.weight_format import WeightFormat  # noqa: E402
from shared.gpt.model import GPT  # noqa: E402
from trainer_service.training.batches import TrainingText  # noqa: E402
from trainer_service.training.config import TrainingConfig  # noqa: E402
from trainer_service.training.trainer import Trainer  # noqa: E402
from trainer_service.training.workers import Workers  # noqa: E402


class Training:
    """`variant` is the optimizer, if it is not that of the preset."""

    def __init__(self, config: dict[str, Any], rows: int, variant: str) -> None:
        whole = TrainingConfig.from_dict({**config, "batch_size": rows} | ({"optimizer": variant} if variant else {}))
        tokens = np.random.default_rng(1).integers(whole.vocabulary_size, size=1_000_000, dtype=np.uint16)
        self._workers = Workers(_ACCELERATOR.threads)
        self._trainer = Trainer(whole, TrainingText(tokens, end_token=0), self._workers)

    def step(self) -> None:
        self._last = self._trainer.take_step()

    def wait(self) -> None:
        mx.eval(self._last.loss, self._trainer.model.parameters())

    def end(self) -> None:
        self._workers.__exit__()

    def peak_bytes(self) -> int:
        return resident_peak() if mx.default_device() == mx.Device(mx.cpu) else mx.get_peak_memory()


class Decoding:
    """Decodes `rows` sequences that start with `position` tokens, as the engine's thread does.

    `variant` "" draws at temperature 0.8, "greedy" takes the likeliest token, "forward" draws nothing; "mlx" draws
    too, and computes in MLX on any device.
    """

    def __init__(self, config: dict[str, Any], rows: int, position: int, variant: str) -> None:
        whole = TrainingConfig.from_dict(config)
        self._position, self._draws = position, variant != "forward"
        # The steps that the decoder has taken ahead of `step`.
        self._ahead = 0
        mx.random.seed(1)
        model = GPT(whole.gpt)
        model.eval()
        mx.eval(model.parameters())
        slots = max(2, rows)
        decoder: Decoder
        # As the other implementations.
        self._factory = DecoderFactory(slots, 1, _ACCELERATOR.cache, WeightFormat.FP32)
        if variant == "mlx":
            decoder = MlxDecoder(model, slots, ProgramCache(), spans_together=8)
        else:
            decoder = self._factory.make(model)
        self._decoder = decoder
        self._runner, self._scheduler = Runner(decoder, prefix_blocks=0), Scheduler(slots)
        sampling = SamplingParameters(temperature=0.0 if variant == "greedy" else 0.8)
        for seed in range(rows):
            prompt = tuple(np.random.default_rng(seed).integers(whole.vocabulary_size, size=position).tolist())
            request = GenerationRequest(
                id=str(seed),
                version=1,
                prompt=prompt,
                seed=seed,
                max_tokens=whole.context_length,
                arrived=time.monotonic(),
                sampling=sampling,
            )
            self._scheduler.add((Sequence(request, 0, whole.context_length, -1, lambda token: b"a"),))
        self._sequences = [one for group in self._scheduler.admit() for one in group]
        while not all(sequence.prefilled for sequence in self._sequences):
            self.step()
        self._start_over()

    def step(self) -> None:
        if self._ahead:
            self._ahead -= 1
            return
        plan = self._scheduler.plan(SPAN_TOKENS, self._runner.max_decode_steps if self._draws else 1)
        assert plan is not None
        if self._draws:
            results = self._runner.run(plan)
        else:
            results = [(one.sequence, NextTokens((plain_draw(0),))) for one in self._runner.forward(plan)[1]]
        self._scheduler.record(plan)
        self._ahead = plan.decode_steps - 1
        for sequence, drawn in results:
            assert isinstance(drawn, NextTokens) and drawn.error is None
            sequence.generated_tokens += len(drawn.draws)
            sequence.last_token = drawn.draws[-1].token
        if any(sequence.most_tokens_left <= 0 for sequence in self._sequences):
            self._start_over()

    def _start_over(self) -> None:
        for sequence in self._sequences:
            sequence.computed_tokens, sequence.generated_tokens = min(sequence.computed_tokens, self._position), 1

    def wait(self) -> None:
        # The round pays for the tokens that the GPU has begun with, as it got the first ones for nothing.
        if isinstance(self._decoder, CudaDecoder):
            self._decoder._gpu.wait()

    def peak_bytes(self) -> int:
        on_cpu = mx.default_device() == mx.Device(mx.cpu)
        return resident_peak() if on_cpu else mx.get_peak_memory() + self._factory.gpu_bytes
