"""Errors that a person caused or can mend. Their text is a whole sentence: what is wrong, and what would be right.

A value from outside enters such a sentence through `shown`.
"""

# Of a value that is too long, this share is its beginning; the rest is its end.
_HEAD_SHARE = 0.7


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
    """Returns a value as a sentence quotes it: printable, on one line, at most about `limit` characters long.

    Text stands in quotes, with what cannot be printed escaped, as in `repr`; anything else as `str` has it, escaped
    likewise. The middle of what is too long is left out.
    """
    if isinstance(value, int) and abs(value) >= 10**limit:
        return f"a number of about {value.bit_length() * 0.30103:,.0f} digits"
    try:
        text = value if isinstance(value, str) else str(value)
    except ValueError:  # Python refuses to write out numbers of several thousand digits, also inside of a list
        text = f"a {type(value).__name__} with a very long number"
    escaped = "".join(_escaped(text[: limit + 1]))
    if len(text) > limit or len(escaped) > limit:
        head = int(limit * _HEAD_SHARE)
        beginning, end = _fitting(text[:head], head), _fitting(text[: -limit - 1 : -1], limit - head - 1)
        escaped = f"{''.join(beginning)}…{''.join(reversed(end))}"
    quote = '"' if "'" in text and '"' not in text else "'"
    return f"{quote}{escaped}{quote}" if isinstance(value, str) else escaped


def _escaped(text: str) -> list[str]:
    return [character if character in "'\"" else repr(character)[1:-1] for character in text]


def _fitting(text: str, room: int) -> list[str]:
    """The first characters of a text, escaped, that fit into a room; an escape is never cut."""
    pieces = _escaped(text)
    while sum(map(len, pieces)) > room:
        pieces.pop()
    return pieces
