"""AdamW as it is used to train GPTs: clipped gradients, bias correction, weight decay on matrices only.

Sources: Loshchilov & Hutter 2019 (AdamW), Brown et al. 2020, appendix B (betas, decay, clipping).
"""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from trainer_service.training import cuda_adamw
from trainer_service.training.config import TrainingConfig

_EPSILON = 1e-8


class AdamW:
    """The moments of every parameter, as trees `m` and `v` of the parameters' shape, and the number of steps so far.

    MLX's optimizer clips and updates each array in separate operations. This one makes one pass over each array, and on
    an NVIDIA GPU uses a few kernels for the whole model.
    """

    def __init__(self, config: TrainingConfig, parameters: dict[str, Any]) -> None:
        self._config = config
        self.state: dict[str, Any] = {
            "step": mx.array(0),
            "m": tree_map(mx.zeros_like, parameters),
            "v": tree_map(mx.zeros_like, parameters),
        }

    def update(
        self, parameters: dict[str, Any], gradients: dict[str, Any], rate: mx.array
    ) -> tuple[dict[str, Any], mx.array]:
        """Updates the moments; returns new parameters, and the norm of the gradients before clipping."""
        config = self._config
        names, old = zip(*tree_flatten(parameters), strict=True)
        new = dict(tree_flatten(gradients))
        changes = [new[name] for name in names]
        first, second = (dict(tree_flatten(self.state[moment])) for moment in "mv")
        step = self.state["step"]
        corrections = [1 - mx.power(beta, step + 1) for beta in (config.beta1, config.beta2)]
        if mx.cuda.is_available():
            norm = mx.sqrt(cuda_adamw.squared_norm(changes))
            scalars = mx.stack([rate, self._clip(norm), *corrections])
            results = cuda_adamw.update(
                old,
                changes,
                [first[name] for name in names],
                [second[name] for name in names],
                scalars,
                beta1=config.beta1,
                beta2=config.beta2,
                epsilon=_EPSILON,
                weight_decay=config.weight_decay,
            )
        else:
            norm = mx.sqrt(sum((mx.square(change).sum() for change in changes), mx.array(0.0)))
            scale = self._clip(norm)
            results = ([], [], [])
            for name, parameter, change in zip(names, old, changes, strict=True):
                gradient = change * scale
                m = config.beta1 * first[name] + (1 - config.beta1) * gradient
                v = config.beta2 * second[name] + (1 - config.beta2) * mx.square(gradient)
                kept = 1 - rate * config.weight_decay if parameter.ndim >= 2 else 1.0
                direction = (m / corrections[0]) / (mx.sqrt(v / corrections[1]) + _EPSILON)
                for result, array in zip(results, (parameter * kept - rate * direction, m, v), strict=True):
                    result.append(array)
        trees = [tree_unflatten(list(zip(names, result, strict=True))) for result in results]
        self.state["step"], self.state["m"], self.state["v"] = step + 1, trees[1], trees[2]
        return trees[0], norm

    def _clip(self, norm: mx.array) -> mx.array:
        """Returns the factor that scales gradients of this norm down to the largest norm; 1 if clipping is off."""
        if not self._config.max_gradient_norm:
            return mx.array(1.0)
        return mx.minimum(self._config.max_gradient_norm / (norm + 1e-6), 1.0)
