"""Limits of each client: the samples that it may have at once, and the tokens that it may use in a minute."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from inference_service.admission import Call
from inference_service.metrics import InferenceMetrics
from shared.errors import ResourceExhausted
from shared.service.access.tokens import Caller

# When a stream of the client ends is not known.
_NEXT_STREAM_S = 1.0
_MINUTE_S = 60.0


class TokenBucket:
    """Tokens that may be used: `per_minute` come back in a minute, and at most that many are there.

    Pure: every method takes the time in seconds. What is used may exceed what is there; the rest is missing later.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, now: float) -> float:
        """Returns 0 if something is there, or else when the next whole token is."""
        self._fill(now)
        return 0.0 if self._level > 0 else (1 - self._level) * _MINUTE_S / self._per_minute

    def take(self, tokens: int, now: float) -> None:
        """Uses tokens."""
        self._fill(now)
        self._level -= tokens

    def _fill(self, now: float) -> None:
        passed_s = max(0.0, now - self._at)
        self._level = min(self._level + passed_s * self._per_minute / _MINUTE_S, float(self._per_minute))
        self._at = max(self._at, now)


@dataclass
class _Account:
    """What a client has and uses."""

    bucket: TokenBucket | None
    samples: int = 0


class ClientLimits:
    """Counts what each named client has and uses, and rejects calls beyond the limits; 0 stands for no limit.

    Operators, and callers without a name, have no limits of their own. Belongs to the event loop.
    """

    def __init__(
        self,
        slots: int,
        streams: int,
        tokens_per_minute: int,
        metrics: InferenceMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._slots = slots
        self._streams = streams
        self._tokens_per_minute = tokens_per_minute
        self._metrics = metrics
        self._clock = clock
        # Their names are those of the file of tokens.
        self._accounts: dict[str, _Account] = {}

    def most_samples(self, caller: Caller | None) -> int:
        """Returns how many samples a call may have at once."""
        if caller is None or caller.is_operator or not self._streams:
            return self._slots
        return min(self._slots, self._streams)

    @contextmanager
    def enter(self, caller: Caller | None, samples: int) -> Iterator[Call]:
        """Encloses a call that has at most this many samples at once; raises `ResourceExhausted` beyond a limit.

        A call that has begun goes on when the tokens of its client are used up; the next one waits.
        """
        if caller is None or caller.is_operator:
            yield Call()
            return
        account = self._account(caller.name)
        now = self._clock()
        if account.bucket is not None and (wait_s := account.bucket.wait_s(now)):
            # Rounded up as statuses carry it, so that who comes back then is let in.
            wait_s = math.ceil(wait_s * 1000) / 1000
            self._metrics.client_refused(caller.name, "tokens")
            raise ResourceExhausted(
                f"{caller.name} has used its {self._tokens_per_minute} tokens a minute; retry in {wait_s:.1f} s.",
                wait_s,
            )
        if self._streams and account.samples + samples > self._streams:
            self._metrics.client_refused(caller.name, "streams")
            raise ResourceExhausted(
                f"{caller.name} has {account.samples} samples already, and {samples} more would exceed its limit of "
                f"{self._streams} at once; retry in {_NEXT_STREAM_S:.1f} s.",
                _NEXT_STREAM_S,
            )

        def charge(tokens: int) -> None:
            self._metrics.client_used(caller.name, tokens)
            if account.bucket is not None:
                account.bucket.take(tokens, self._clock())

        account.samples += samples
        try:
            yield Call(charge=charge)
        finally:
            account.samples -= samples

    def _account(self, name: str) -> _Account:
        if name not in self._accounts:
            bucket = TokenBucket(self._tokens_per_minute, self._clock()) if self._tokens_per_minute else None
            self._accounts[name] = _Account(bucket)
        return self._accounts[name]
