"""The optimizer as it is used to train GPTs: clipped gradients; AdamW with bias correction, or Muon for the matrices of
the blocks and AdamW for the rest; weight decay on arrays of two or more axes only.

Sources: Loshchilov & Hutter 2019 (AdamW), Brown et al. 2020, appendix B (betas, decay, clipping).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from shared.gpt import cuda
from trainer_service.training import cuda_adamw, muon
from trainer_service.training.config import TrainingConfig

EPSILON = 1e-8

Arrays = dict[str, mx.array]


class Optimizer:
    """The number of steps so far; the momentum of every parameter, as a tree `m` of the parameters' shape; and the mean
    square of the gradients of those that AdamW updates, as a tree `v` with these alone.

    MLX's optimizers clip and update each array in separate operations. This one makes one pass over each array, and on
    an NVIDIA GPU uses a few kernels for all that AdamW updates.
    """

    def __init__(self, config: TrainingConfig, parameters: dict[str, Any]) -> None:
        self._config = config
        arrays = _flat(parameters)
        both = {n: a for n, a in arrays.items() if config.optimizer == "adamw" or not muon.is_matrix(n)}
        # Arrays of their own, because `CpuOptimizer` updates them in place.
        m, v = ({name: mx.zeros_like(array) for name, array in each.items()} for each in (arrays, both))
        self.state: dict[str, Any] = {"step": mx.array(0), "m": _tree(m), "v": _tree(v)}

    def update(
        self, parameters: dict[str, Any], gradients: dict[str, Any], rate: mx.array
    ) -> tuple[dict[str, Any], mx.array]:
        """Updates the moments; returns new parameters, and the norm of the gradients before clipping."""
        old, changes, m, v = map(_flat, (parameters, gradients, self.state["m"], self.state["v"]))
        matrices = [name for name in old if name not in v]
        norm = _norm([changes[name] for name in old])
        scale = self._clip(norm)
        new, new_m, new_v = self._adamw([name for name in old if name in v], old, changes, m, v, rate, scale)
        if matrices:
            new_matrices, momenta = self._muon(matrices, old, changes, m, rate, scale)
            new, new_m = new | new_matrices, new_m | momenta
        self.state["step"], self.state["m"], self.state["v"] = self.state["step"] + 1, _tree(new_m), _tree(new_v)
        return _tree(new), norm

    def _adamw(
        self, names: Sequence[str], old: Arrays, changes: Arrays, m: Arrays, v: Arrays, rate: mx.array, scale: mx.array
    ) -> tuple[Arrays, Arrays, Arrays]:
        """Returns the new parameters and moments with these names."""
        config = self._config
        corrections = [1 - mx.power(beta, self.state["step"] + 1) for beta in (config.beta1, config.beta2)]
        if cuda.is_default_device():
            columns = cuda_adamw.update(
                [old[name] for name in names],
                [changes[name] for name in names],
                [m[name] for name in names],
                [v[name] for name in names],
                mx.stack([rate, scale, *corrections]),
                beta1=config.beta1,
                beta2=config.beta2,
                epsilon=EPSILON,
                weight_decay=config.weight_decay,
            )
            new, new_m, new_v = (dict(zip(names, column, strict=True)) for column in columns)
            return new, new_m, new_v
        new, new_m, new_v = {}, {}, {}
        for name in names:
            gradient = changes[name] * scale
            new_m[name] = config.beta1 * m[name] + (1 - config.beta1) * gradient
            new_v[name] = config.beta2 * v[name] + (1 - config.beta2) * mx.square(gradient)
            kept = 1 - rate * config.weight_decay if old[name].ndim >= 2 else 1.0
            direction = (new_m[name] / corrections[0]) / (mx.sqrt(new_v[name] / corrections[1]) + EPSILON)
            new[name] = old[name] * kept - rate * direction
        return new, new_m, new_v

    def _muon(
        self, names: Sequence[str], old: Arrays, changes: Arrays, m: Arrays, rate: mx.array, scale: mx.array
    ) -> tuple[Arrays, Arrays]:
        """Returns the new matrices and momenta with these names; Nesterov's momentum."""
        momenta, ahead = {}, {}
        for name in names:
            gradient = changes[name] * scale
            momenta[name] = muon.MOMENTUM * m[name] + (1 - muon.MOMENTUM) * gradient
            ahead[name] = muon.MOMENTUM * momenta[name] + (1 - muon.MOMENTUM) * gradient
        directions = muon.directions(ahead)
        kept = 1 - rate * self._config.weight_decay
        return {name: old[name] * kept - rate * directions[name] for name in names}, momenta

    def _clip(self, norm: mx.array) -> mx.array:
        """Returns the factor that scales gradients of this norm down to the largest norm; 1 if clipping is off."""
        if not self._config.max_gradient_norm:
            return mx.array(1.0)
        return mx.minimum(self._config.max_gradient_norm / (norm + 1e-6), 1.0)


def _norm(arrays: Sequence[mx.array]) -> mx.array:
    """Returns the root of the sum of the squares of all numbers."""
    if cuda.is_default_device():
        return mx.sqrt(cuda_adamw.squared_norm(arrays))
    return mx.sqrt(sum((mx.square(array).sum() for array in arrays), mx.array(0.0)))


def _flat(tree: dict[str, Any]) -> Arrays:
    arrays: Arrays = dict(tree_flatten(tree))
    return arrays


def _tree(arrays: Arrays) -> dict[str, Any]:
    tree: dict[str, Any] = tree_unflatten(list(arrays.items()))
    return tree
