"""Errors that a person caused or can mend. Their text is a whole sentence: what is wrong, and what would be right.

A value from outside enters such a sentence through `shown`.
"""

from shared.text import excerpt


class GptloopError(Exception):
    """Base of every error that is reported as one sentence instead of a stack trace."""


class InvalidArgument(GptloopError):
    """A value that a caller gave cannot be used; calling again with the same value cannot help."""


class NotFound(GptloopError):
    """What the caller named does not exist."""


class AlreadyExists(GptloopError):
    """What the caller wants to create, or the port it wants to open, is already there."""


class FailedPrecondition(GptloopError):
    """The system is not in a state in which the call can be carried out."""


class ResourceExhausted(GptloopError):
    """A limit is reached; the same call may succeed in `retry_after_s`, where that is known."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Unauthenticated(GptloopError):
    """The call needs a credential that the caller did not bring."""


class DeadlineExceeded(GptloopError):
    """The caller's own deadline passed before the call had ended."""


class Unavailable(GptloopError):
    """Something that is needed cannot be reached now: Redis, a worker, a first version."""


class DataError(GptloopError):
    """A data set cannot be read, or holds too little to train on."""


class CorruptCheckpoint(GptloopError):
    """A checkpoint's files do not match its manifest, or cannot be read."""


class IncompleteCheckpoint(CorruptCheckpoint):
    """A file of a checkpoint is missing or too short, as while the checkpoint is still being copied."""


class RunOwnershipLost(GptloopError):
    """Another process took over the run; this one must not write it any more."""


class TrainingDiverged(GptloopError):
    """The loss is not finite any more."""


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as a sentence quotes it: an `excerpt` of at most about `limit` characters, text in quotes."""
    quote = ('"' if "'" in value and '"' not in value else "'") if isinstance(value, str) else ""
    return f"{quote}{excerpt(value, limit)}{quote}"
