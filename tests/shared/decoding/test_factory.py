"""Which decoder suits an NVIDIA GPU, without one."""

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import pytest

from shared.decoding import decoder
from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.decoder import DecoderFactory
from shared.decoding.mlx_decoder import MlxDecoder
from shared.decoding.weight_format import WeightFormat
from shared.device.cuda_driver import Kernel, KernelsError
from shared.gpt.config import GPTConfig
from tests.decoders import COMPILED
from tests.emulated_gpu import EmulatedGpu
from tests.shared.decoding.test_decoders import CONFIG
from tests.shared.gpt.random_models import random_model


class Ada(EmulatedGpu):
    def __init__(self, cache: object) -> None:
        super().__init__()
        self.capability = (8, 9)


class Unknown(Ada):
    """A GPU for which the installed compiler has no kernels."""

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        raise KernelsError("NVRTC cannot compile the kernels: invalid value for --gpu-architecture")


class Turing(Ada):
    def __init__(self, cache: object) -> None:
        super().__init__(cache)
        self.capability = (7, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpu", "config", "kind"),
    [
        (None, CONFIG, CpuDecoder),
        (Ada, CONFIG, CudaDecoder),
        (Turing, CONFIG, MlxDecoder),
        (Unknown, CONFIG, MlxDecoder),
        (Ada, replace(CONFIG, context_length=4097), MlxDecoder),
    ],
)
def test_the_kernels_decode_what_they_take_on_the_gpus_that_they_need(
    gpu: type[Ada] | None, config: GPTConfig, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, factory = random_model(config, 1), DecoderFactory(2, 1, COMPILED, None if gpu else WeightFormat.INT8)
    monkeypatch.setattr(decoder, "on_cpu", lambda: gpu is None)
    if gpu is not None:
        monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
        monkeypatch.setattr(decoder, "CudaDriver", gpu)
    made = factory.make(model)
    assert isinstance(made, kind)
    # As much as it holds on the GPU now, and nothing when it has gone.
    held = factory.gpu_bytes
    assert (held > 0) is (kind is CudaDecoder)
    assert held <= made.memory_bytes
    del made
    assert factory.gpu_bytes == 0
