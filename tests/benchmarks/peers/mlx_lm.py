"""mlx-lm's GPT-2 in plain MLX, trained as in mlx-lm's tuner. Its head is always tied."""

import os
from functools import partial
from typing import Any

from shared.device import accelerator
from tests.benchmarks.side_by_side import ROOT, cores
from tests.benchmarks.worker import resident_peak
from tests.mlx_on_cpu import speed_up_mlx

os.environ["OMP_NUM_THREADS"] = str(cores())
speed_up_mlx(ROOT / ".pytest_cache" / "benchmarks")
accelerator.prepare(ROOT / ".pytest_cache" / "benchmarks")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.gpt2 import Model, ModelArgs  # noqa: E402


def make_model(config: dict[str, Any]) -> Any:
    mx.random.seed(1)
    model = Model(
        ModelArgs(
            model_type="gpt2",
            n_ctx=config["context_length"],
            n_embd=config["width"],
            n_head=config["heads"],
            n_layer=config["layers"],
            n_positions=config["context_length"],
            layer_norm_epsilon=1e-5,
            vocab_size=config["vocabulary_size"],
        )
    )
    mx.eval(model.parameters())
    return model


class Training:
    def __init__(self, config: dict[str, Any], rows: int, variant: str) -> None:
        self._model = make_model(config)
        optimizer = optim.AdamW(config["learning_rate"], weight_decay=config["weight_decay"])
        optimizer.init(self._model.trainable_parameters())
        tokens = mx.random.randint(0, config["vocabulary_size"], (rows, config["context_length"] + 1))
        self._inputs, self._targets = tokens[:, :-1], tokens[:, 1:]
        self._state = [self._model.state, optimizer.state, mx.random.state]

        def loss(model: Any, inputs: mx.array, targets: mx.array) -> mx.array:
            return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")

        @partial(mx.compile, inputs=self._state, outputs=self._state)
        def take(inputs: mx.array, targets: mx.array) -> mx.array:
            value, gradients = nn.value_and_grad(self._model, loss)(self._model, inputs, targets)
            gradients, _ = optim.clip_grad_norm(gradients, config["max_gradient_norm"])
            optimizer.update(self._model, gradients)
            return value

        self._take = take

    def step(self) -> None:
        mx.eval(self._take(self._inputs, self._targets), self._state)

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_peak() if mx.default_device() == mx.Device(mx.cpu) else mx.get_peak_memory()


class Decoding:
    """Decodes `rows` rows greedily, starting at `position` tokens; every step reads the tokens back."""

    def __init__(self, config: dict[str, Any], rows: int, position: int, variant: str) -> None:
        self._model = make_model(config)
        self._model.eval()
        self._rows, self._start, self._length = rows, position, config["context_length"]
        self._fill()

    def _fill(self) -> None:
        self._cache = make_prompt_cache(self._model)
        if self._start:
            self._model(mx.zeros((self._rows, self._start), mx.int32), self._cache)
        mx.eval([one.state for one in self._cache])
        self._position = self._start
        self._tokens = mx.zeros((self._rows, 1), mx.int32)

    def step(self) -> None:
        if self._position == self._length:
            self._fill()
        logits = self._model(self._tokens, self._cache)
        self._tokens = mx.argmax(logits[:, -1], axis=-1, keepdims=True)
        self._tokens.tolist()
        self._position += 1

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return resident_peak()
