"""Decoders for tests; what a CPU's needs is compiled once and kept between runs."""

from functools import cache
from pathlib import Path

import mlx.core as mx

from shared.decoding.cpu.decoder import CpuDecoder
from shared.decoding.cpu.library import CpuLibrary, load_library
from shared.decoding.cuda.decoder import CudaDecoder
from shared.decoding.decoder import Decoder, DecoderFactory
from shared.decoding.mlx_decoder import MlxDecoder, ProgramCache
from shared.decoding.weight_format import DEFAULT_WEIGHTS, WeightFormat
from shared.device.cuda_driver import CudaDriver, Gpu
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu
from tests.emulated_gpu import EmulatedGpu

COMPILED = Path(__file__).parent.parent / ".pytest_cache" / "accelerator"


@cache
def cpu_library() -> CpuLibrary:
    return load_library(COMPILED)


def cpu_decoder(model: GPT, slots: int, threads: int = 1, weights: WeightFormat = WeightFormat.FP32) -> CpuDecoder:
    return CpuDecoder(model, slots, threads, cpu_library(), weights)


def mlx_decoder(model: GPT, slots: int, spans_together: int = 1) -> MlxDecoder:
    return MlxDecoder(model, slots, ProgramCache(), spans_together)


def make_gpu(eager: bool = False) -> Gpu:
    """Returns an NVIDIA GPU, or an emulation of one, which may be eager."""
    return CudaDriver(COMPILED) if mx.cuda.is_available() else EmulatedGpu(eager)


def cuda_decoder(model: GPT, slots: int, eager: bool = False) -> CudaDecoder:
    return CudaDecoder(model, slots, make_gpu(eager))


def make_decoder(model: GPT, slots: int, weights: WeightFormat = DEFAULT_WEIGHTS) -> Decoder:
    """Returns the decoder that suits the device, on one thread."""
    return DecoderFactory(slots, 1, COMPILED, weights).make(model)


def default_weights() -> WeightFormat:
    """Returns the format in which a server on this device computes."""
    if mx.cuda.is_available():
        return WeightFormat.BF16
    return DEFAULT_WEIGHTS if on_cpu() else WeightFormat.FP32
