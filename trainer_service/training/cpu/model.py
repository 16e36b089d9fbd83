"""A model in the form in which the library that trains on a CPU reads it."""

from collections.abc import Mapping

import numpy as np

from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from trainer_service.training.cpu.library import Arrays, Floats, Layer, Model, Pair, Shape


class CpuModel:
    """The arrays of a model's shape, contiguous and in fp32: its weights, or slopes of them. Arrays have names as in
    `GPT`."""

    def __init__(self, config: GPTConfig, epsilon: float, arrays: Mapping[str, Floats]) -> None:
        # Keeps them as long as the pointers.
        self._arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        layers = (Layer * config.layers)()
        for number, layer in enumerate(layers):
            block = f"blocks.{number}"
            layer.attention_norm = self._pair(f"{block}.attention_norm")
            layer.qkv = self._pair(f"{block}.attention.qkv")
            layer.output = self._pair(f"{block}.attention.output")
            layer.feed_forward_norm = self._pair(f"{block}.feed_forward_norm")
            layer.up = self._pair(f"{block}.feed_forward.up")
            layer.down = self._pair(f"{block}.feed_forward.down")
        self.structure = Model(
            Shape(config.layers, config.width, config.hidden_width, config.heads, config.vocabulary_size, epsilon),
            Arrays(
                self._address("token_embedding.weight"),
                self._address("position_embedding.weight"),
                self._pair("final_norm"),
                self._address("token_embedding.weight" if config.tied_head else "head.weight"),
                layers,
            ),
        )

    @classmethod
    def of(cls, model: GPT) -> "CpuModel":
        """Returns the weights of a model; they share its memory."""
        arrays = {name: np.asarray(array) for name, array in parameters_of(model).items()}
        return cls(model.config, model.final_norm.eps, arrays)

    def _address(self, name: str) -> int:
        return self._arrays[name].ctypes.data

    def _pair(self, name: str) -> Pair:
        return Pair(self._address(f"{name}.weight"), self._address(f"{name}.bias"))
