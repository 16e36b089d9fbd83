"""Runs of tiny models, for tests of training."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from shared.gpt import cuda
from shared.gpt.config import GPTConfig
from shared.gpt.model import GPT, parameters_of
from trainer_service.presets import find_preset
from trainer_service.training.batches import TeacherText, TrainingText
from trainer_service.training.config import TrainingConfig
from trainer_service.training.trainer import Trainer


def tolerance(fp32: float, bf16: float) -> float:
    """Returns the tolerance for what is computed in bf16 on an NVIDIA GPU, and elsewhere in fp32."""
    return bf16 if cuda.is_default_device() else fp32


def tiny(**values: object) -> TrainingConfig:
    config = replace(
        find_preset("demo"),
        vocabulary_size=300,
        layers=1,
        width=16,
        heads=2,
        hidden_width=32,
        context_length=8,
        batch_size=4,
        max_steps=20,
        warmup_steps=3,
        dropout=0.1,
        learning_rate=3e-3,
        optimizer="adamw",
    )
    return replace(config, **values)  # type: ignore[arg-type]


TOKENS = (np.arange(5000) * 7 % 300).astype(np.uint16)
END = 0
TEXT = TrainingText(TOKENS, END)
# A text of a teacher, of which two thirds count.
MIXTURE = TrainingText(TOKENS, END, TeacherText(TOKENS[::-1], np.arange(5000) % 3 > 0))


def teachers(count: int, dropout: float = 0.5) -> list[GPT]:
    """Models of other shapes than the student's."""
    mx.random.seed(count)
    models = []
    for number in range(count):
        shape = GPTConfig(1 + number, 8 * (3 + number), 4, 32, 16, 300, number % 2 == 0, dropout)
        models.append(GPT(shape))
        # Predictions that differ enough to be learned.
        models[-1].apply(lambda weight: 10 * weight if weight.ndim == 2 else weight)
    return models


def weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in parameters_of(trainer.model).items()}
