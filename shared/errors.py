"""Errors that a person caused or can fix. Their text is a whole sentence: what is wrong, and what would be right.

Use `shown` to quote a value from outside in such a sentence.
"""

from shared.text import excerpt


class GptloopError(Exception):
    """Base class of the errors that are reported as one sentence instead of a traceback.

    `request_id` names the call in the server's log, if a server raised the error.
    """

    request_id: str = ""


class InvalidArgument(GptloopError):
    """A value from the caller is invalid; the same call always fails."""


class NotFound(GptloopError):
    """The object that the caller named does not exist."""


class AlreadyExists(GptloopError):
    """The object to create exists already, or the port to open is in use."""


class FailedPrecondition(GptloopError):
    """The call is valid, but not possible in the current state of the system."""


class NewerFormat(FailedPrecondition):
    """A newer gptloop has written a checkpoint, so this one neither reads, replaces nor removes it."""


class StoreFailed(FailedPrecondition, OSError):
    """The place of a registry cannot be reached, or refuses an operation; another try may succeed.

    Handlers of a failing disk catch it too. Its text is a sentence that names the place and says what to do.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.strerror = sentence.removesuffix(".")


class ResourceExhausted(GptloopError):
    """A limit is reached; the same call may succeed after `retry_after_s` seconds, if that is known."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Unauthenticated(GptloopError):
    """The call lacks a valid credential."""


class PermissionDenied(GptloopError):
    """The caller is known, but may not do this."""


class DeadlineExceeded(GptloopError):
    """The caller's deadline passed before the call ended."""


class Unavailable(GptloopError):
    """Something that the call needs is not available now: Redis, a worker, a first version."""


class RankLost(Unavailable):
    """Another of the processes that train a model together has ended, or cannot be reached."""


class DataError(GptloopError):
    """A data set cannot be read, or is too small to train on."""


class CorruptCheckpoint(GptloopError):
    """A checkpoint's files do not match its manifest, or cannot be read."""


class UnreadableCheckpoint(CorruptCheckpoint):
    """Files of a checkpoint cannot be read now, so nobody can tell whether they are damaged."""


class IncompleteCheckpoint(CorruptCheckpoint):
    """A file of a checkpoint is missing or too short, for example because the checkpoint is still being copied."""


class RunOwnershipLost(GptloopError):
    """Another process owns the run now; this one must not write to it."""


class TrainingDiverged(GptloopError):
    """The loss is no longer finite."""


def shown(value: object, limit: int = 80) -> str:
    """Returns a value as a sentence quotes it: an `excerpt` of at most about `limit` characters, text in quotes."""
    quote = ('"' if "'" in value and '"' not in value else "'") if isinstance(value, str) else ""
    return f"{quote}{excerpt(value, limit)}{quote}"
