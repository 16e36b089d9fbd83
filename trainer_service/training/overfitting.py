"""Detects overfitting."""

# This many evaluations in a row without improvement are more than noise.
_PATIENCE = 3


class OverfittingWatch:
    """Warns once when the held-out loss stays above its best while the training loss is below it."""

    def __init__(self) -> None:
        self._best = float("inf")
        self._worse = 0
        self._warned = False

    def check(self, training_loss: float, validation_loss: float) -> str | None:
        """Returns a warning or None; both losses are in nats per token."""
        if validation_loss < self._best:
            self._best, self._worse = validation_loss, 0
            return None
        self._worse += 1
        if self._warned or self._worse < _PATIENCE or training_loss >= self._best:
            return None
        self._warned = True
        return (
            f"Overfitting: held-out loss is {validation_loss:.3f} and has not improved on {self._best:.3f} for "
            f"{self._worse} evaluations, while training loss is {training_loss:.3f}. The best version keeps serving; "
            "more text, a smaller model or dropout would help."
        )
