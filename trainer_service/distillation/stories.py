"""The work of a job that pays a large teacher for stories."""

import asyncio
import time
from collections.abc import Iterator
from decimal import Decimal
from itertools import count
from pathlib import Path

from shared.errors import AlreadyExists
from trainer_service.distillation.estimate import estimate
from trainer_service.distillation.groq_teacher import GroqTeacher
from trainer_service.distillation.ledger import Account, Ledger, stories_folder
from trainer_service.distillation.paid_calls import PaidCalls, Question, Terms
from trainer_service.distillation.prices import about, dollars
from trainer_service.distillation.prompts import MAX_TOKENS, TEMPLATE, draw_prompt
from trainer_service.jobs.attempt import Attempt, Stopped, preparation_report
from trainer_service.jobs.events import Notice
from trainer_service.jobs.specs import StoriesSpec

_TEMPERATURE = 1.0
# An attempt that lost its job may write its last answers for this long.
_LOCK_LIMIT_S = 15.0
_POLL_S = 0.2
# How often progress is reported, unless a whole percentage is done.
_REPORT_INTERVAL_S = 10.0


def write_stories(spec: StoriesSpec, attempt: Attempt) -> None:
    """Asks for stories until their set has as many as it shall have, and reports counts and cost.

    Raises `Stopped` if the attempt has to end, `FailedPrecondition` without a key or prices, `AlreadyExists` if another
    job writes the set, and the errors of `PaidCalls.make`.
    """
    prices = attempt.groq.prices()
    attempt.groq.read_key()
    with _open(stories_folder(attempt.directories.data, spec.name), attempt) as ledger:
        account = ledger.account
        attempt.emit(Notice(estimate(spec, account, prices, attempt.groq.model)))
        terms = Terms(TEMPLATE, MAX_TOKENS, _TEMPERATURE, prices, spec.cap_usd)
        try:
            asyncio.run(_ask(spec, attempt, ledger, terms))
        finally:
            attempt.emit(Notice(describe_account(spec.name, account)))


def describe_account(name: str, account: Account) -> str:
    """Returns a sentence on what a set has and has cost."""
    parts = [f"{account.answered:,} stories for {dollars(account.answered_usd)}"]
    if account.refused:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in sorted(account.refused.items()))
        parts.append(f"calls without a story for {dollars(account.refused_usd)} ({kinds})")
    if account.open_usd:
        worst = dollars(sum(account.open_usd.values(), Decimal(0)))
        parts.append(f"calls whose answer is lost: {len(account.open_usd):,}, with their worst case of {worst}")
    if account.garbled:
        parts.append(f"damaged lines: {account.garbled:,}")
    return f"The set {name} has {'; '.join(parts)}; in all {dollars(account.spent_usd)}."


async def _ask(spec: StoriesSpec, attempt: Attempt, ledger: Ledger, terms: Terms) -> None:
    report = preparation_report(attempt)
    stage, reported = "", (-_REPORT_INTERVAL_S, -1)

    def check() -> None:
        nonlocal stage, reported
        answered, now_s = ledger.account.answered, time.monotonic()
        percentage = 100 * answered // spec.count
        if now_s - reported[0] >= _REPORT_INTERVAL_S or percentage != reported[1]:
            cost = about(ledger.account.charged_usd)
            stage, reported = f"writing stories: {answered:,} of {spec.count:,} for {cost}", (now_s, percentage)
        report(stage, min(answered / spec.count, 1.0))

    async with GroqTeacher(attempt.groq) as teacher:
        await PaidCalls(teacher, ledger, terms, check).make(_questions(), spec.count)


def _questions() -> Iterator[Question]:
    for sample in count():
        prompt = draw_prompt(sample)
        yield Question(sample, prompt.messages(), vars(prompt))


def _open(folder: Path, attempt: Attempt) -> Ledger:
    deadline_s = time.monotonic() + _LOCK_LIMIT_S
    while True:
        try:
            return Ledger(folder)
        except AlreadyExists:
            if time.monotonic() > deadline_s:
                raise
        if attempt.stop_requested():
            raise Stopped
        time.sleep(_POLL_S)
