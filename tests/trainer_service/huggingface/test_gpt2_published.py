"""A published tiny GPT-2 gives the logits that another program computed from it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from shared.decoding.decoder import Decoder
from shared.decoding.spans import SPAN_TOKENS, Span
from shared.gpt.model import GPT
from tests.decoders import cpu_decoder, mlx_decoder
from tests.shared.gpt.random_models import forward
from trainer_service.huggingface.gpt2 import read_config, read_model


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    if "GPTLOOP_TEST_DATA" not in os.environ:
        pytest.skip("GPTLOOP_TEST_DATA is not set")
    path = Path(os.environ["GPTLOOP_TEST_DATA"], "tiny-random-gpt2", "as-published.golden.json")
    values: dict[str, Any] = json.loads(path.read_text())
    assert len(values["cases"]) == 6
    return values


@pytest.fixture(scope="module")
def published(golden: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> GPT:
    source = Path(os.environ["GPTLOOP_TEST_DATA"], "tiny-random-gpt2")
    directory = tmp_path_factory.mktemp("tiny")
    shutil.copyfile(source / "as-published.safetensors", directory / "model.safetensors")
    # The shape is in the golden file; the published config.json is incomplete for this program.
    settings = json.loads((source / "config.json").read_text()) | golden["config"]
    (directory / "config.json").write_text(json.dumps(settings))
    return read_model(directory, read_config(directory).gpt)


def test_the_model_gives_the_published_logits(golden: dict[str, Any], published: GPT) -> None:
    for case in golden["cases"]:
        logits = np.asarray(published(mx.array([case["prompt"]])))[0]  # (T, V)
        np.testing.assert_allclose(logits[-1], case["last_logits"], rtol=0, atol=1e-5)
        assert logits.argmax(-1).tolist() == case["argmax_per_position"]


def spans_of(prompt: tuple[int, ...]) -> list[Span]:
    return [Span(1, start, prompt[start : start + SPAN_TOKENS]) for start in range(0, len(prompt), SPAN_TOKENS)]


MakeDecoder = Callable[[GPT, int], Decoder]
MAKERS: list[MakeDecoder] = [cpu_decoder, mlx_decoder]
decoders = pytest.mark.parametrize("make", MAKERS, ids=["cpu", "mlx"])


@decoders
def test_decoders_give_the_published_logits_and_greedy_tokens(
    golden: dict[str, Any], published: GPT, make: MakeDecoder
) -> None:
    decoder = make(published, 2)
    for case in golden["cases"]:
        prompt = tuple(case["prompt"])
        logits = forward(decoder, spans_of(prompt))[-1]
        np.testing.assert_allclose(logits, case["last_logits"], rtol=0, atol=1e-5)
        greedy: list[int] = []
        expected = case.get("greedy_24", [])
        while len(greedy) < len(expected):
            greedy.append(int(logits.argmax()))
            (logits,) = forward(decoder, [Span(1, len(prompt) + len(greedy) - 1, (greedy[-1],))])
        assert greedy == expected


@decoders
def test_decoders_reach_the_last_position_of_the_context(
    golden: dict[str, Any], published: GPT, make: MakeDecoder
) -> None:
    case = max(golden["cases"], key=lambda case: len(case["prompt"]))
    prompt = tuple(case["prompt"])
    assert len(prompt) == published.config.context_length == 512
    decoder = make(published, 2)
    forward(decoder, spans_of(prompt[:-1]))
    (logits,) = forward(decoder, [Span(1, 511, prompt[-1:])])
    np.testing.assert_allclose(logits, case["last_logits"], rtol=0, atol=1e-5)
