"""What a large teacher answers to a call, and the ways in which a call fails."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True)
class Usage:
    """The tokens that a call was charged for; `reasoning_tokens` are part of `completion_tokens`."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """A complete answer; `model` and `fingerprint` name what wrote it, as the service reports it."""

    text: str
    usage: Usage
    finish_reason: str
    model: str
    fingerprint: str


class Kind(Enum):
    """Why a call has no answer that can be used."""

    # Charged, with a known usage.
    EMPTY = "empty"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"
    # Perhaps charged.
    UNREADABLE = "unreadable"
    TIMED_OUT = "timed out"
    CUT_OFF = "cut off"
    SERVER_ERROR = "server error"
    # Not charged, because the service has not begun the work: the same question can be asked again.
    UNREACHABLE = "unreachable"
    UNAVAILABLE = "unavailable"
    RATE_LIMITED = "rate limited"
    DAILY_LIMIT = "daily limit"
    # Not charged, and the same for every call.
    TOO_LARGE = "too large"
    REJECTED = "rejected"

    @property
    def is_free(self) -> bool:
        """Whether the service has certainly not charged for the call."""
        return self in _FREE

    @property
    def is_outage(self) -> bool:
        """Whether the service may answer the next calls, but only later."""
        return self in _OUTAGES

    @property
    def is_final(self) -> bool:
        """Whether every further call would fail alike."""
        return self in (Kind.TOO_LARGE, Kind.REJECTED)


_OUTAGES = (
    *(Kind.UNREADABLE, Kind.TIMED_OUT, Kind.CUT_OFF, Kind.SERVER_ERROR),
    *(Kind.UNREACHABLE, Kind.UNAVAILABLE),
)
_FREE = (Kind.UNREACHABLE, Kind.UNAVAILABLE, Kind.RATE_LIMITED, Kind.DAILY_LIMIT, Kind.TOO_LARGE, Kind.REJECTED)


class Refused(Exception):
    """A call without an answer that can be used; its text is a sentence.

    usage: what the call was charged for; None if that is not known, or if it was not charged.
    wait_s: how long the service asks its callers to wait, in seconds, if it says so.
    """

    def __init__(self, kind: Kind, sentence: str, usage: Usage | None = None, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.kind = kind
        self.usage = usage
        self.wait_s = wait_s
