"""The optimizer on a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from trainer_service.training import muon
from trainer_service.training.config import TrainingConfig
from trainer_service.training.cpu.library import AdamW, Floats, Muon, ThreadScratch, Update, load_library
from trainer_service.training.optimizer import EPSILON, Optimizer
from trainer_service.training.workers import Workers

# Numbers of which a thread takes the norm, or which it updates with AdamW, at a time.
_PIECE = 1 << 18


class CpuOptimizer(Optimizer):
    """Updates parameters and moments in place, in several threads; their number does not change a bit."""

    def __init__(self, config: TrainingConfig, parameters: dict[str, Any], workers: Workers) -> None:
        super().__init__(config, parameters)
        mx.eval(self.state)
        self._workers = workers
        self._library = load_library()
        self._of_thread = ThreadScratch()
        self._muon_values = Muon(muon.MOMENTUM, muon.UPDATE_RMS, muon.POLYNOMIALS)

    def update(
        self, parameters: dict[str, Any], gradients: dict[str, Any], rate: mx.array
    ) -> tuple[dict[str, Any], mx.array]:
        """As that of `Optimizer`, but in place: returns the parameters that it got."""
        config = self._config
        mx.eval(parameters, gradients)
        weights, changes, m, v = map(_views, (parameters, gradients, self.state["m"], self.state["v"]))
        pieces = [piece for array in changes.values() for piece in _pieces(array)]
        norm = np.sqrt(np.float32(sum(self._workers.map(self._library.squared_norm, pieces))))
        clip: Any = self._clip(mx.array(norm)).item()
        step = self.state["step"].item() + 1
        adamw = AdamW(config.beta1, config.beta2, 1 - config.beta1**step, 1 - config.beta2**step, EPSILON)

        def tasks() -> Iterator[Callable[[], None]]:
            # Matrices take longest, so they come first.
            for name in sorted(changes, key=lambda name: (name in v, -changes[name].size)):
                decay = config.weight_decay if weights[name].ndim >= 2 else 0.0
                update = Update(clip, rate.item(), 1 - rate.item() * decay)
                arrays = (changes[name], weights[name], m[name])
                if name in v:
                    for some in zip(*map(_pieces, (*arrays, v[name])), strict=True):
                        yield partial(self._library.adamw, update, adamw, *some)
                else:
                    for matrices in zip(*(np.split(array, muon.count(name)) for array in arrays), strict=True):
                        yield partial(self._update_matrix, update, *matrices)

        self._workers.map(lambda task: task(), tasks())
        self.state["step"] = self.state["step"] + 1
        return parameters, mx.array(norm)

    def _update_matrix(self, update: Update, changes: Floats, weights: Floats, momenta: Floats) -> None:
        self._library.muon(update, self._muon_values, changes, weights, momenta, self._of_thread.scratch)


def _views(tree: dict[str, Any]) -> dict[str, Floats]:
    """Returns arrays that share the memory of those of a tree, by their names."""
    arrays: dict[str, mx.array] = dict(tree_flatten(tree))
    views = {name: np.asarray(array) for name, array in arrays.items()}
    assert all(view.dtype == np.float32 and view.flags.c_contiguous and view.flags.writeable for view in views.values())
    return views


def _pieces(array: Floats) -> list[Floats]:
    flat = array.reshape(-1)
    return [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
