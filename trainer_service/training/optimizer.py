"""AdamW as GPTs are trained with it: bias correction, decay on matrices only, warm-up and cosine.

Sources: Loshchilov & Hutter 2019 (AdamW), Brown et al. 2020, appendix B (betas, decay, schedule).
"""

import math

import mlx.core as mx
import mlx.optimizers as optim

from trainer_service.training.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: mx.array) -> mx.array:
    """The rate of a step, counted from 0: linear up over `warmup_steps`, then a cosine down to the final share."""
    warming = config.learning_rate * (step + 1) / max(config.warmup_steps, 1)
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    final = config.final_learning_rate_ratio
    cosine = final + (1 - final) * 0.5 * (1 + mx.cos(math.pi * mx.clip(progress, 0, 1)))
    return mx.where(step < config.warmup_steps, warming, config.learning_rate * cosine)


def make_optimizer(config: TrainingConfig) -> optim.MultiOptimizer:
    """One AdamW for matrices, which decay, and one for biases and norms, which do not."""

    def adamw(weight_decay: float) -> optim.AdamW:
        return optim.AdamW(
            learning_rate=lambda step: learning_rate(config, step),
            betas=[config.beta1, config.beta2],
            weight_decay=weight_decay,
            bias_correction=True,
        )

    return optim.MultiOptimizer(
        [adamw(config.weight_decay), adamw(0.0)], filters=[lambda _name, weight: weight.ndim >= 2]
    )
