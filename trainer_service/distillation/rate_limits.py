"""When the next call may be made: the limits that the service reports, and the pauses after failures. Pure.

Every method takes the time of a monotonic clock, in seconds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trainer_service.distillation.answers import Kind

# A limit that asks for a longer wait pauses the job, which gives its worker back meanwhile.
LONGEST_WAIT_S = 120.0
# The waits after a refusal that does not name one.
_SHORT_WAIT_S = 10.0
_DAILY_WAIT_S = 3600.0
# The job gives up after this many outages in a row, each with its pause.
_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)

_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[dhms])")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,15})?")
_LIMIT = re.compile(
    r"on (?P<what>[\w ]+?) \((?P<unit>\w+)\): Limit (?P<limit>[0-9.]+),.*?Requested ~?(?P<requested>[0-9]+)"
)
_AGAIN = re.compile(r"try again in ([0-9.dhms]+[dhms])")


def read_duration(text: str) -> float | None:
    """Returns the seconds of a duration such as `2m59.56s`, `644ms` or `7`; None for any other text."""
    if _NUMBER.fullmatch(text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


@dataclass(frozen=True)
class Limit:
    """A refusal because of a limit: its kind, a sentence, and how long to wait, in seconds."""

    kind: Kind
    sentence: str
    wait_s: float


def read_limit(message: str, retry_after: str) -> Limit:
    """Reads the message of a refusal with the status 413 or 429, and its header `retry-after`.

    A message reads "… on tokens per minute (TPM): Limit 8000, Used 7000, Requested 1500. Please try again in 3.75s."
    """
    found = _LIMIT.search(message)
    again = _AGAIN.search(message)
    wait_s = read_duration(again[1] if again else retry_after)
    what = found["what"] if found else "calls"
    if found and float(found["requested"]) > float(found["limit"]):
        sentence = (
            f"A call needs {int(found['requested']):,} {what.partition(' ')[0]}, but the limit of the account at Groq "
            f"is {float(found['limit']):,.0f} {what}: raise it, or name another model in GPTLOOP_GROQ_MODEL."
        )
        return Limit(Kind.TOO_LARGE, sentence, 0.0)
    if (found and found["unit"].endswith("D")) or (wait_s is not None and wait_s > LONGEST_WAIT_S):
        return Limit(Kind.DAILY_LIMIT, f"The limit of {what} at Groq is reached.", wait_s or _DAILY_WAIT_S)
    return Limit(Kind.RATE_LIMITED, f"The limit of {what} at Groq is reached for a moment.", wait_s or _SHORT_WAIT_S)


@dataclass(frozen=True)
class _Window:
    """What a limit had left when a call reported it; it fills evenly until it is full again."""

    limit: float
    remaining: float
    call: int
    seen_s: float
    full_at_s: float

    def wait_s(self, amount: float, now_s: float) -> float:
        """Returns how long to wait until `amount` is left; more than the limit waits until it is full."""
        missing = min(amount, self.limit) - self.remaining
        if missing <= 0:
            return 0.0
        share = missing / (self.limit - self.remaining)
        return max(self.seen_s + min(share, 1.0) * (self.full_at_s - self.seen_s) - now_s, 0.0)


class RateLimits:
    """The limits of an account, as the answers to its calls report them: requests a day, and tokens a minute."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}
        # The tokens of each call without an answer yet, by its number.
        self._open: dict[int, float] = {}
        self._calls = 0
        self._blocked_until_s = 0.0

    def begin(self, tokens: float) -> int:
        """Notes the beginning of a call that may take `tokens` tokens; returns its number."""
        self._calls += 1
        self._open[self._calls] = tokens
        return self._calls

    def end(self, call: int, headers: Mapping[str, str], now_s: float) -> None:
        """Notes the headers `x-ratelimit-…` of the answer to a call, if it has any."""
        self._open.pop(call, None)
        for name in ("requests", "tokens"):
            limit, remaining, reset_s = (
                read_duration(headers.get(f"x-ratelimit-{part}-{name}", "")) for part in ("limit", "remaining", "reset")
            )
            last = self._windows.get(name)
            # Answers may arrive in another order than the calls were made.
            if limit and remaining is not None and reset_s is not None and (last is None or call > last.call):
                self._windows[name] = _Window(limit, min(remaining, limit), call, now_s, now_s + reset_s)

    def block(self, wait_s: float, now_s: float) -> None:
        """Lets no call begin for `wait_s` seconds."""
        self._blocked_until_s = max(self._blocked_until_s, now_s + wait_s)

    def wait_s(self, tokens: float, now_s: float) -> float:
        """Returns how long a call that may take `tokens` tokens has to wait before it begins."""
        waits = [self._blocked_until_s - now_s]
        for name, window in self._windows.items():
            # What calls take that began after the one that reported.
            later = [taken for call, taken in self._open.items() if call > window.call]
            amount = sum(later) + tokens if name == "tokens" else len(later) + 1
            waits.append(window.wait_s(amount, now_s))
        return max(0.0, *waits)


class Backoff:
    """The pauses after outages, each twice as long as the one before it."""

    def __init__(self) -> None:
        self._outages = 0
        self._noticed_s = float("-inf")

    def failed(self, began_s: float, now_s: float) -> bool:
        """Notes an outage, which a call that began at `began_s` met; returns whether it is time to give up."""
        # Calls that began before the last outage was noticed met the same one.
        if began_s >= self._noticed_s:
            self._outages += 1
            self._noticed_s = now_s
        return self._outages > len(_PAUSES_S)

    def succeeded(self) -> None:
        """Notes that the service has answered."""
        self._outages = 0

    def wait_s(self, now_s: float) -> float:
        """Returns how long the next call has to wait."""
        if not self._outages:
            return 0.0
        return max(self._noticed_s + _PAUSES_S[min(self._outages, len(_PAUSES_S)) - 1] - now_s, 0.0)
