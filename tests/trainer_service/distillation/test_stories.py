import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import ROUND_UP, Decimal
from typing import Any

import pytest

from shared.errors import AlreadyExists, FailedPrecondition, ResourceExhausted, Unavailable
from tests.groq_service import CHARGED, PRICES, GroqService, Outcome, write_story
from tests.trainer_service.site import Site
from trainer_service.distillation import paid_calls, rate_limits, stories
from trainer_service.distillation.ledger import LEDGER_NAME, Account, Ledger, read_account, read_stories, stories_folder
from trainer_service.distillation.prices import dollars, most_usage
from trainer_service.distillation.prompts import MAX_TOKENS, draw_prompt
from trainer_service.distillation.stories import write_stories
from trainer_service.jobs.attempt import Paused, Stopped
from trainer_service.jobs.events import Notice, Preparation
from trainer_service.jobs.specs import StoriesSpec

MOST_USD = max(PRICES.cost(most_usage(draw_prompt(sample).messages(), MAX_TOKENS)) for sample in range(100))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limits, "_PAUSES_S", (0.01, 0.01, 0.01))
    monkeypatch.setattr(paid_calls, "_TICK_S", 0.01)


def write(
    site: Site,
    service: GroqService,
    count: int,
    max_cost_usd: float = 1.0,
    stop_requested: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Account:
    """Writes the set `s`, checks its ledger against the bill of the service, and returns what it adds up to."""
    attempt = replace(site.attempt(stop_requested), groq=replace(service.settings, **settings))
    try:
        write_stories(StoriesSpec("s", count, max_cost_usd), attempt)
    finally:
        account = account_of(site)
        assert service.bill_usd <= account.spent_usd <= Decimal(str(max_cost_usd))
        assert set(service.charged().values()) <= {1}
    return account


def account_of(site: Site) -> Account:
    return read_account(stories_folder(site.directories.data, "s"))


def notices(site: Site) -> list[str]:
    return [notice.text for notice in site.all_told(Notice)]


def test_a_set_gets_its_stories_once_and_more_on_demand(site: Site, service: GroqService) -> None:
    assert write(site, service, 12).answered == 12
    assert write(site, service, 12).answered == 12
    account = write(site, service, 20)
    assert len(service.calls) == account.answered == 20
    assert account.spent_usd == service.bill_usd
    found = read_stories(stories_folder(site.directories.data, "s"))
    assert {story.prompt for story in found} == {draw_prompt(sample).short() for sample in range(20)}
    assert all(story.text.startswith("There was a word.") for story in found)
    assert any(stage.stage.startswith("writing stories: 20 of 20 for $0.001") for stage in site.all_told(Preparation))


def test_a_call_is_in_the_ledger_before_it_is_made(site: Site, service: GroqService) -> None:
    path = stories_folder(site.directories.data, "s") / LEDGER_NAME

    def write_after_a_look(body: Mapping[str, Any]) -> str:
        sent = [row["prompt"] for row in map(json.loads, path.read_text().splitlines()) if row["state"] == "sent"]
        asked = [draw_prompt(sample) for sample in range(len(sent))]
        assert any(prompt.messages() == body["messages"] for prompt in asked) and len(sent) > len(service.calls)
        return write_story(body)

    service.write = write_after_a_look
    # A failed check would end the connection.
    assert write(site, service, 10).answered == len(service.calls) == 10


def test_progress_and_the_end_are_told(site: Site, service: GroqService) -> None:
    service.script.extend([Outcome.ANSWER, Outcome.EMPTY, Outcome.TRUNCATED, Outcome.MINUTE_LIMIT])
    account = write(site, service, 5)
    before, after = notices(site)
    assert before.startswith("5 more stories by openai/gpt-oss-20b cost typically $0.0008 and at most $0.00")
    assert after == (
        f"The set s has 5 stories for {dollars(account.answered_usd)}; calls without a story for "
        f"{dollars(account.refused_usd)} (1 empty, 1 rate limited, 1 truncated); in all {dollars(account.spent_usd)}."
    )


def test_what_cannot_be_used_is_paid_once_counted_and_never_a_story(site: Site, service: GroqService) -> None:
    bad = [Outcome.EMPTY, Outcome.TRUNCATED, Outcome.UNREADABLE]
    service.script.extend([Outcome.ANSWER, *bad, *bad])
    account = write(site, service, 6)
    assert account.refused == {"empty": 2, "truncated": 2, "unreadable": 2}
    assert len(read_stories(stories_folder(site.directories.data, "s"))) == 6
    assert len(service.calls) == 12 and len(service.charged()) == 12
    # What an unreadable answer was charged is not known, so its worst case counts.
    assert 0 < account.spent_usd - service.bill_usd < 2 * MOST_USD


def test_a_call_that_costs_more_than_its_worst_case_ends_the_work(site: Site, service: GroqService) -> None:
    service.write = lambda body: 8000 * "word "
    with pytest.raises(
        FailedPrecondition,
        match=r"A call has cost \$0\.003\d+, but its worst case was \$0\.000\d+, so no cap can be kept",
    ):
        write(site, service, 6)
    assert len(service.calls) == 1 and account_of(site).spent_usd == service.bill_usd


def test_short_limits_that_never_end_pause_the_job(site: Site, service: GroqService) -> None:
    service.script.extend([Outcome.ANSWER, *15 * [Outcome.MINUTE_LIMIT], Outcome.ANSWER, *100 * [Outcome.MINUTE_LIMIT]])
    before = time.time()
    with pytest.raises(Paused, match="calls in a row were refused: The limit of tokens per minute at Groq") as paused:
        write(site, service, 30)
    assert paused.value.until > before + 500
    # Up to 8 calls are under way at a time, and their answers come in any order.
    assert 8 + 20 <= account_of(site).refused["rate limited"] <= 15 + 20 + 7


def test_a_question_is_asked_again_only_if_it_was_not_paid_for(site: Site, service: GroqService) -> None:
    free = [Outcome.UNAVAILABLE, Outcome.MINUTE_LIMIT, Outcome.UNAVAILABLE]
    paid = [Outcome.DROP, Outcome.GATEWAY_UNAVAILABLE]
    service.script.extend([Outcome.ANSWER, *free, *paid])
    account = write(site, service, 6)
    assert account.refused == {"unavailable": 2, "rate limited": 1, "cut off": 1, "server error": 1}
    again = [call.question for call in service.calls if call.outcome not in CHARGED]
    assert set(again) <= {call.question for call in service.calls if call.outcome is Outcome.ANSWER}
    lost = {call.question for call in service.calls if call.outcome in paid}
    assert len(lost) == 2 and all([call.question for call in service.calls].count(each) == 1 for each in lost)


@pytest.mark.parametrize("room", [0, 1, 3])
def test_the_job_stops_before_its_cap_and_goes_on_after_a_raise(site: Site, service: GroqService, room: int) -> None:
    spent_usd = write(site, service, 4).spent_usd
    cap_usd = float((spent_usd + room * MOST_USD).quantize(Decimal("0.000001"), ROUND_UP))
    with pytest.raises(
        ResourceExhausted, match=r"^The cap of \$0\.\d+ is reached: \d+ answers have cost up to \$0\."
    ) as e:
        write(site, service, 100, cap_usd)
    assert str(e.value).endswith("Run the same command with a higher cap to continue.")
    account = account_of(site)
    # Not one call more would have fitted.
    assert account.spent_usd <= Decimal(str(cap_usd)) < account.spent_usd + MOST_USD * Decimal("1.01")
    assert account.answered >= 4 + room and not account.open_usd
    assert write(site, service, account.answered + 2).answered == account.answered + 2


def test_a_call_without_an_answer_counts_in_full_and_is_not_asked_again(site: Site, service: GroqService) -> None:
    folder = stories_folder(site.directories.data, "s")
    service.answering.clear()
    stopping = False
    attempts = iter(range(10**9))

    def stop_requested() -> bool:
        nonlocal stopping
        stopping = stopping or bool(service.calls)
        return stopping and next(attempts) > 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paid_calls, "_GRACE_S", 0.05)
        with pytest.raises(Stopped):
            write(site, service, 5, stop_requested=stop_requested)
    account = read_account(folder)
    assert (account.answered, len(account.open_usd)) == (0, 1) and account.spent_usd > service.bill_usd
    service.answering.set()
    account = write(site, service, 5)
    assert account.answered == 5 and len(account.open_usd) == 1 and len(service.calls) == 6
    assert "calls whose answer is lost: 1, with their worst case of $0.000" in notices(site)[-1]


def test_answers_that_arrive_while_the_job_stops_are_kept(site: Site, service: GroqService) -> None:
    service.latency_s = 0.1
    with pytest.raises(Stopped):
        write(site, service, 500, stop_requested=lambda: len(service.calls) > 4)
    account = account_of(site)
    assert account.answered == len(service.calls) > 4 and account.spent_usd == service.bill_usd


@pytest.mark.parametrize("outcome", [Outcome.UNAVAILABLE, Outcome.BAD_GATEWAY, Outcome.DROP, Outcome.UNREADABLE])
def test_a_service_that_fails_for_long_ends_the_attempt(site: Site, service: GroqService, outcome: Outcome) -> None:
    service.script.extend([Outcome.ANSWER] + 100 * [outcome])
    with pytest.raises(Unavailable):
        write(site, service, 5)
    assert len(service.calls) < 40
    service.script.clear()
    assert write(site, service, 5).answered == 5


def test_answers_that_can_never_be_used_end_the_job_before_they_cost_much(site: Site, service: GroqService) -> None:
    service.script.extend(19 * [Outcome.EMPTY] + [Outcome.ANSWER] + 30 * [Outcome.EMPTY])
    with pytest.raises(FailedPrecondition, match=r"^20 answers in a row could not be used, the last of them because: "):
        write(site, service, 100)
    # Those that were on their way count too.
    assert 19 + 1 + 20 <= len(service.calls) < 19 + 1 + 20 + 8
    assert account_of(site).answered == 1


def test_without_a_network_nothing_is_paid_for(site: Site, service: GroqService) -> None:
    with pytest.raises(Unavailable, match=r"^Groq cannot be reached at http://127\.0\.0\.1:9 \(.*check the network"):
        write(site, service, 5, url="http://127.0.0.1:9")
    account = account_of(site)
    assert account.spent_usd == 0 and account.refused == {"unreachable": 4} and not account.open_usd


def test_a_limit_of_the_day_pauses_the_job_until_it_ends(site: Site, service: GroqService) -> None:
    service.script.extend([Outcome.ANSWER, Outcome.ANSWER, Outcome.DAY_LIMIT])
    began = time.time()
    with pytest.raises(Paused, match=r"^The limit of tokens per day at Groq is reached\.$") as paused:
        write(site, service, 5)
    wait_s = 7 * 3600 + 12 * 60 + 3.5
    assert began + wait_s <= paused.value.until <= time.time() + wait_s
    assert write(site, service, 5).answered == 5


def test_requests_of_the_day_that_are_used_up_pause_the_job_before_a_refusal(site: Site, service: GroqService) -> None:
    service.requests_per_day = 2
    with pytest.raises(Paused, match=r"^The limit of calls per day at Groq is reached\.$"):
        write(site, service, 5)
    assert [call.outcome for call in service.calls] == 2 * [Outcome.ANSWER]


def test_calls_that_are_too_large_or_rejected_end_the_job_at_once(site: Site, service: GroqService) -> None:
    service.script.append(Outcome.TOO_LARGE)
    with pytest.raises(FailedPrecondition, match="A call needs 1,500 tokens, but the limit of the account"):
        write(site, service, 5)
    with pytest.raises(FailedPrecondition, match="Groq does not know the key: correct GROQ_API_KEY"):
        write(site, service, 5, key="gsk_wrong")
    with pytest.raises(FailedPrecondition, match="Groq rejects the call to 'llama' with the status 404"):
        write(site, service, 5, model="llama")
    assert account_of(site).spent_usd == 0 and len(service.calls) == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"key": ""}, "There is no key for Groq: set GROQ_API_KEY"),
        ({"input_usd": None}, "GPTLOOP_GROQ_INPUT_USD is not set, so nothing is paid for: set it to the price of a"),
        ({"output_usd": None}, "GPTLOOP_GROQ_OUTPUT_USD is not set"),
    ],
)
def test_without_a_key_or_a_price_nothing_is_asked(
    site: Site, service: GroqService, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(FailedPrecondition, match=sentence):
        write(site, service, 5, **settings)
    assert not stories_folder(site.directories.data, "s").exists() and not service.calls


def test_a_set_is_written_by_one_job_at_a_time(
    site: Site, service: GroqService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stories, "_LOCK_LIMIT_S", 0.1)
    monkeypatch.setattr(stories, "_POLL_S", 0.01)
    with Ledger(stories_folder(site.directories.data, "s")):
        with pytest.raises(AlreadyExists, match="Another process writes"):
            write(site, service, 1)
        with pytest.raises(Stopped):
            write(site, service, 1, stop_requested=lambda: True)
    assert not service.calls


def test_a_torn_row_is_told_and_costs_no_story(site: Site, service: GroqService) -> None:
    write(site, service, 3)
    path = stories_folder(site.directories.data, "s") / LEDGER_NAME
    rows = path.read_bytes().splitlines(keepends=True)
    assert json.loads(rows[-1])["state"] == "answered"
    path.write_bytes(b"".join(rows)[:-20])
    account = write(site, service, 3)
    assert (account.answered, account.garbled, len(account.open_usd), len(service.calls)) == (3, 1, 1, 4)
    assert "; damaged lines: 1; in all $0.00" in notices(site)[-1]


def test_another_model_writes_its_own_stories_into_the_set(site: Site, service: GroqService) -> None:
    write(site, service, 2)
    assert write(site, service, 4, model="openai/gpt-oss-120b").answered == 4
    prompts = [story.prompt for story in read_stories(stories_folder(site.directories.data, "s"))]
    assert sorted(prompts) == sorted(2 * [draw_prompt(0).short(), draw_prompt(1).short()])


def test_several_calls_wait_for_their_answers_at_once_after_the_first(site: Site, service: GroqService) -> None:
    def write_one(body: Mapping[str, Any]) -> str:
        # Every answer after the first one waits.
        if service.calls:
            service.answering.clear()
        return write_story(body)

    def stop_requested() -> bool:
        if len(service.calls) == 9:
            service.answering.set()
        return len(service.calls) >= 9

    service.write = write_one
    with pytest.raises(Stopped):
        write(site, service, 100, stop_requested=stop_requested)
    assert service.most_at_once == 8
