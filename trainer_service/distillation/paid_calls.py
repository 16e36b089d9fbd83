"""Makes paid calls: several at once, within a budget and the limits of the account, each one in the ledger."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal

from shared.errors import FailedPrecondition, ResourceExhausted, Unavailable
from trainer_service.distillation.answers import Kind, Refused, Usage
from trainer_service.distillation.groq_teacher import GroqTeacher
from trainer_service.distillation.ledger import Ledger, key_of
from trainer_service.distillation.prices import Messages, Prices, Schema, dollars, most_usage
from trainer_service.distillation.rate_limits import LONGEST_WAIT_S, Backoff
from trainer_service.jobs.attempt import Paused

# Calls that wait for their answers at the same time, once the service has answered one.
_AT_ONCE = 8
# How often the work asks whether to stop.
_TICK_S = 0.2
# When the work stops, calls that have begun may end within this time, so that their answers are kept.
_GRACE_S = 5.0
# The work ends after this many answers in a row that cannot be used: more of them would cost money for nothing.
_MOST_UNUSABLE = 20
# The job pauses after this many refusals in a row because of a short limit: each one is two rows in the ledger.
_MOST_LIMITED, _LIMITED_PAUSE_S = 20, 600.0


@dataclass(frozen=True)
class Question:
    """What one call asks.

    sample: the number of its sample, which sets it apart from other questions of the same wording.
    about: what the ledger notes about it.
    schema: the JSON schema of its answer; None for plain text.
    """

    sample: int
    messages: Messages
    about: Mapping[str, object]
    schema: Schema | None = None


@dataclass(frozen=True)
class Terms:
    """What all calls of a set have in common.

    template: the name of the wording of the questions.
    max_tokens: the longest answer, with its reasoning.
    cap_usd: the most that the set may cost in all.
    """

    template: str
    max_tokens: int
    temperature: float
    prices: Prices
    cap_usd: Decimal


class PaidCalls:
    """Calls whose answers go into a ledger, all on one event loop.

    A call is made only if the set stays within its cap in the worst case of all calls without an answer. A call that
    may have been paid for is never made again. `check` is called at short intervals, and ends the work by an error.
    """

    def __init__(self, teacher: GroqTeacher, ledger: Ledger, terms: Terms, check: Callable[[], None]) -> None:
        self._teacher = teacher
        self._ledger = ledger
        self._terms = terms
        self._check = check
        self._parameters = teacher.parameters(terms.max_tokens, terms.temperature)
        self._calls: set[asyncio.Task[None]] = set()
        # Questions whose calls were certainly not paid for.
        self._again: deque[Question] = deque()
        self._backoff = Backoff()
        self._at_once = 1
        self._unusable = 0
        self._limited = 0
        # Ends the work as soon as no call waits for its answer.
        self._ending: Exception | None = None

    async def make(self, questions: Iterable[Question], wanted: int) -> None:
        """Asks until the ledger has `wanted` answers, or until no question is left.

        Raises `ResourceExhausted` at the cap, `Paused` at a limit that lasts, `FailedPrecondition` if the service
        rejects every call, answers nothing that can be used or charges more than the worst case of a call, and
        `Unavailable` if it does not answer for long.
        """
        unasked = iter(questions)
        try:
            while True:
                self._check()
                while self._may_begin(wanted) and (question := self._next(unasked)):
                    if not self._fits(question):
                        self._again.appendleft(question)
                        break
                    self._begin(question)
                    # The call counts against the limits from its first turn on.
                    await asyncio.sleep(0)
                if not self._calls and (self._ending or self._has(wanted) or not self._again):
                    break
                await self._wait()
        finally:
            await self._end_calls()
        if self._ending:
            raise self._ending

    def _has(self, wanted: int) -> bool:
        return self._ledger.account.answered + len(self._calls) >= wanted

    def _may_begin(self, wanted: int) -> bool:
        return not self._ending and not self._has(wanted) and len(self._calls) < self._at_once

    def _next(self, unasked: Iterator[Question]) -> Question | None:
        if self._again:
            return self._again.popleft()
        return next((each for each in unasked if self._ledger.account.may_ask(self._key(each))), None)

    def _fits(self, question: Question) -> bool:
        """Whether the question may be asked now; at the cap and at a limit that lasts, the work ends instead."""
        most = self._most(question)
        most_usd, spent_usd = self._terms.prices.cost(most), self._ledger.account.spent_usd
        if spent_usd + most_usd > self._terms.cap_usd:
            # The calls without an answer yet may cost less than their worst case.
            if not self._calls:
                self._ending = ResourceExhausted(
                    f"The cap of {dollars(self._terms.cap_usd)} is reached: {self._ledger.account.answered:,} answers "
                    f"have cost up to {dollars(spent_usd)}, and the next one may cost {dollars(most_usd)}. Run the "
                    "same command with a higher cap to continue."
                )
            return False
        now_s = time.monotonic()
        wait_s = self._teacher.limits.wait_s(most.prompt_tokens + most.completion_tokens, now_s)
        if wait_s > LONGEST_WAIT_S:
            self._pause("The limit of calls per day at Groq is reached.", wait_s)
        return max(wait_s, self._backoff.wait_s(now_s)) <= 0

    def _begin(self, question: Question) -> None:
        """Notes a call in the ledger, and then makes it."""
        key, most_usd = self._key(question), self._terms.prices.cost(self._most(question))
        self._ledger.sent(key, question.sample, self._teacher.model, self._terms.template, most_usd, question.about)
        self._calls.add(asyncio.create_task(self._call(question, key, most_usd)))

    async def _call(self, question: Question, key: str, most_usd: Decimal) -> None:
        began_s = time.monotonic()
        try:
            answer = await self._teacher.ask(
                question.messages, self._terms.max_tokens, question.schema, self._terms.temperature
            )
        except Refused as refused:
            known_usd = self._cost(refused.usage, most_usd) if refused.usage else most_usd
            self._ledger.refused(key, Decimal(0) if refused.kind.is_free else known_usd, refused.kind)
            self._respond(refused, question, began_s)
        else:
            self._ledger.answered(key, self._cost(answer.usage, most_usd), answer)
            self._backoff.succeeded()
            self._unusable, self._limited, self._at_once = 0, 0, _AT_ONCE

    def _cost(self, usage: Usage, most_usd: Decimal) -> Decimal:
        """Returns what a call has cost; ends the work if that is more than its worst case."""
        cost_usd = self._terms.prices.cost(usage)
        if cost_usd > most_usd:
            # First of all reasons, because no cap holds any longer.
            self._ending = FailedPrecondition(
                f"A call has cost {dollars(cost_usd)}, but its worst case was {dollars(most_usd)}, so no cap can be "
                f"kept: {self._teacher.model} was charged for {usage.prompt_tokens:,} tokens of the prompt and "
                f"{usage.completion_tokens:,} of the answer."
            )
        return cost_usd

    def _respond(self, refused: Refused, question: Question, began_s: float) -> None:
        """Decides how the work goes on after a call without an answer."""
        kind, now_s = refused.kind, time.monotonic()
        if kind.is_free:
            self._again.append(question)
        if kind is Kind.RATE_LIMITED:
            self._teacher.limits.block(refused.wait_s or 0.0, now_s)
            self._limited += 1
            if self._limited >= _MOST_LIMITED:
                self._pause(f"{self._limited} calls in a row were refused: {refused}", _LIMITED_PAUSE_S)
        elif kind is Kind.DAILY_LIMIT:
            self._pause(str(refused), refused.wait_s or 0.0)
        elif kind.is_final:
            self._ending = self._ending or FailedPrecondition(str(refused))
        elif kind.is_outage:
            if self._backoff.failed(began_s, now_s):
                self._ending = self._ending or Unavailable(str(refused))
        else:
            self._backoff.succeeded()
            self._limited = 0
            self._unusable += 1
            if self._unusable >= _MOST_UNUSABLE:
                sentence = f"{self._unusable} answers in a row could not be used, the last of them because: {refused}"
                self._ending = self._ending or FailedPrecondition(sentence)

    def _pause(self, reason: str, wait_s: float) -> None:
        self._ending = self._ending or Paused(time.time() + wait_s, reason)

    async def _wait(self) -> None:
        """Waits until a call has ended, but not for long."""
        if not self._calls:
            await asyncio.sleep(_TICK_S)
            return
        done, self._calls = await asyncio.wait(self._calls, timeout=_TICK_S, return_when=asyncio.FIRST_COMPLETED)
        for call in done:
            call.result()

    async def _end_calls(self) -> None:
        """Gives the calls without an answer a moment, and then gives them up: they count in full."""
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=_GRACE_S)
            for call in late:
                call.cancel()
            await asyncio.gather(*self._calls, return_exceptions=True)

    def _most(self, question: Question) -> Usage:
        return most_usage(question.messages, self._terms.max_tokens, question.schema)

    def _key(self, question: Question) -> str:
        return key_of(self._teacher.model, self._terms.template, self._parameters, question.sample)
