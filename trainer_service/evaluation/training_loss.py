"""Compares the loss on the training text with that on held-out text: has the version learned its text by heart?"""

from collections.abc import Callable

from shared.gpt.model import GPT
from shared.gpt.tokenizer import Tokenizer
from trainer_service.evaluation.record import Interval, Overfit, TextQuality, TrainingLoss
from trainer_service.evaluation.statistics import unpaired_interval
from trainer_service.evaluation.text_quality import measure_text
from trainer_service.training.batches import Tokens
from trainer_service.training.workers import Workers

# A gap of more than this share of the training loss is strong.
_STRONG_SHARE = 0.1


def measure_training_loss(
    model: GPT,
    training: Tokens,
    held_out: TextQuality,
    tokenizer: Tokenizer,
    *,
    window: int,
    stride: int,
    workers: Workers,
    report: Callable[[float], object],
) -> TrainingLoss:
    """Returns the loss on the first training tokens, as many as the held-out text has, in the same kind of windows.

    Takes the same arguments as `measure_text`, and raises the same errors.
    """
    measured = measure_text(
        model,
        training[: sum(held_out.unit_tokens)],
        tokenizer,
        window=window,
        stride=stride,
        workers=workers,
        report=report,
    )
    gap = unpaired_interval(measured.unit_nats, measured.unit_tokens, held_out.unit_nats, held_out.unit_tokens)
    return TrainingLoss(
        nats_per_token=measured.nats_per_token,
        tokens=sum(measured.unit_tokens),
        interval=measured.interval,
        gap=held_out.nats_per_token - measured.nats_per_token,
        gap_interval=gap,
        overfit=verdict(measured.nats_per_token, gap),
    )


def verdict(training_nats: float, gap: Interval | None) -> Overfit:
    """Returns what the interval of the gap says, beside the training loss in nats per token."""
    if gap is None:
        return Overfit.UNKNOWN
    if gap.low <= 0:
        return Overfit.NONE
    return Overfit.STRONG if gap.low > _STRONG_SHARE * training_nats else Overfit.SLIGHT
