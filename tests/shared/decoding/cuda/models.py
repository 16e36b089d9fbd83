"""Models and decoders for the tests of the CUDA decoder."""

from functools import cache

import numpy as np

from shared.decoding.cuda.decoder import CudaDecoder
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT
from tests.decoders import cuda_decoder
from tests.shared.decoding.test_decoders import (
    CONFIG,
    SLOTS,
    assert_close,
)
from tests.shared.gpt.random_models import random_model

# Logits of a few units; those of a wide model are larger.
TOLERANCE = 0.08


@cache
def model_of(config: GPTConfig) -> GPT:
    return random_model(config, 1)


def decoder_for(config: GPTConfig = CONFIG, slots: int = SLOTS, eager: bool = False) -> CudaDecoder:
    return cuda_decoder(model_of(config), slots, eager)


def assert_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert_close(actual, expected, max(TOLERANCE, 0.01 * float(np.abs(expected).max())))
