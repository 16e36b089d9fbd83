"""Noticing that a model learns its text by heart."""

# So many evaluations in a row above the best are more than noise.
_PATIENCE = 3


class OverfittingWatch:
    """Warns once when held-out loss keeps above its best while training loss is below it."""

    def __init__(self) -> None:
        self._best = float("inf")
        self._worse = 0
        self._warned = False

    def check(self, training_loss: float, validation_loss: float) -> str | None:
        """A warning, or None; both losses in nats per token."""
        if validation_loss < self._best:
            self._best, self._worse = validation_loss, 0
            return None
        self._worse += 1
        if self._warned or self._worse < _PATIENCE or training_loss >= self._best:
            return None
        self._warned = True
        return (
            f"Overfitting: held-out loss is {validation_loss:.3f} and has not improved on {self._best:.3f} for "
            f"{self._worse} evaluations, while training loss is {training_loss:.3f}. The best version stays the one "
            "that serves; more text, a smaller model or dropout would help."
        )
