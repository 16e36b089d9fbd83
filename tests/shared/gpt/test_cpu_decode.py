import os
import platform
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from shared.gpt.cache import KVCache
from shared.gpt.config import GPTConfig
from shared.gpt.cpu_decode import decode, product
from shared.gpt.model import GPT
from shared.gpt.operations import on_cpu
from tests.fakes import tiny_model

pytestmark = pytest.mark.skipif(not on_cpu(), reason="MLX does not compute on the CPU")

WIDE = GPTConfig(2, 96, 3, 384, 40, 3001, tied_head=False)


def filled_cache(config: GPTConfig, slots: int) -> KVCache:
    cache = KVCache(config, slots)
    for number, layer in enumerate(cache.layers):
        keys, values = mx.random.split(mx.random.key(number))
        layer.keys = mx.random.normal(layer.keys.shape, key=keys)
        layer.values = mx.random.normal(layer.values.shape, key=values)
    return cache


def tokens_and_positions(config: GPTConfig, rows: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(rows)
    tokens = generator.integers(config.vocabulary_size, size=rows, dtype=np.int32)
    return tokens, generator.integers(config.context_length, size=rows, dtype=np.int32)


@pytest.mark.parametrize("rows", [1, 2, 5, 33, 70])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 2), (7, 31), (48, 32), (384, 97), (1536, 50), (40_000, 3)])
def test_a_product_is_that_of_the_whole_matrices(rows: int, inputs: int, outputs: int) -> None:
    generator = np.random.default_rng(rows)
    x = generator.standard_normal((rows, inputs), np.float32)
    weight = generator.standard_normal((outputs, inputs), np.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.abs(product(x, weight) - expected).max() < 1e-5 * inputs


_ROWS_ALIKE = """
import numpy as np
from shared.gpt.cpu_decode import product
generator = np.random.default_rng(1)
for inputs, outputs in ((160, 480), (384, 1000), (1536, 384)):
    row, weight = (generator.standard_normal((rows, inputs), np.float32) for rows in (1, outputs))
    rows = [each for count in range(2, 41) for each in product(np.repeat(row, count, axis=0), weight)]
    assert all((each == rows[0]).all() for each in rows)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the named cores are of another architecture")
@pytest.mark.parametrize("core", ["Sandybridge", "Haswell", "Zen"])
def test_a_row_has_the_same_bits_in_every_product_on_cores_without_avx512(core: str) -> None:
    environment = {**os.environ, "OPENBLAS_CORETYPE": core, "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _ROWS_ALIKE], env=environment, check=True)


@pytest.mark.parametrize("rows", [1, 3, 34])
def test_logits_and_cache_are_those_of_mlx(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(1, WIDE)
    here, there = filled_cache(WIDE, rows), filled_cache(WIDE, rows)
    tokens, positions = tokens_and_positions(WIDE, rows)
    logits = decode(model, tokens, here, positions)
    monkeypatch.setattr("shared.gpt.model.on_cpu", lambda: False)
    expected = model.decode(mx.array(tokens), there, mx.array(positions))
    assert mx.allclose(mx.array(logits), expected, rtol=0, atol=1e-5)
    for one, other in zip(here.arrays, there.arrays, strict=True):
        assert mx.allclose(one, other, rtol=0, atol=1e-5)


def test_slots_beyond_the_tokens_are_left_alone() -> None:
    model: GPT = tiny_model(1, WIDE)
    tokens, positions = tokens_and_positions(WIDE, 2)
    cache, untouched = filled_cache(WIDE, 4), filled_cache(WIDE, 4)
    decode(model, tokens, cache, positions)
    for one, other in zip(cache.arrays, untouched.arrays, strict=True):
        assert not mx.array_equal(one[:2], other[:2])
        assert mx.array_equal(one[2:], other[2:])


def test_a_layer_of_a_new_cache_has_memory_of_its_own() -> None:
    model: GPT = tiny_model(1, WIDE)
    cache = KVCache(WIDE, 2)
    decode(model, np.array([1, 2], np.int32), cache, np.array([0, 0], np.int32))
    written = [np.array(array[:, :, 0]) for array in cache.arrays]
    assert len({array.tobytes() for array in written}) == len(written)
    assert not any(np.array(array[:, :, 1:]).any() for array in cache.arrays)
