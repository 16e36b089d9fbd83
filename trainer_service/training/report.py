"""A report on the last steps of a training run. Importing this module does not load MLX."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """Means since the last report, losses in nats per token; `tokens` includes those of resumed parts.

    `tokens_per_second` excludes evaluations, `eta_s` includes them. `eta_s` is None after the first step of an attempt,
    which may compile and so predicts nothing about the others.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    eta_s: float | None
    best_validation_loss: float | None
