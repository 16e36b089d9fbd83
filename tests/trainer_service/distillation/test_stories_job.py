"""Jobs that pay for stories as their users run them: real processes, a real Redis, real signals, a local service."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from decimal import Decimal
from pathlib import Path

import pytest

from tests import groq_service
from tests.groq_service import KEY, PRICES, GroqService, Outcome
from tests.jobs import events_of
from tests.redis_process import RedisServer
from tests.trainer_service.distillation.workplace import Workplace
from tests.waiting import wait_until
from trainer_service.distillation.ledger import read_stories
from trainer_service.distillation.prices import most_usage
from trainer_service.distillation.prompts import MAX_TOKENS, draw_prompt
from trainer_service.jobs.events import JobState, Preparation, StateChanged

pytestmark = pytest.mark.slow

KILLS = 10


@pytest.fixture
def workplace(tmp_path: Path, mortal_redis: RedisServer, service: GroqService) -> Iterator[Workplace]:
    workplace = Workplace(tmp_path, mortal_redis, service)
    yield workplace
    workplace.end()
    assert KEY not in workplace.log


def under_way(workplace: Workplace, service: GroqService, job: str, fewest_calls: int) -> None:
    """Waits until an attempt has begun, has kept a story, and has made some more calls."""

    def events() -> int:
        return sum(isinstance(event, Preparation) for event in events_of(workplace.queue, job))

    def ended() -> bool:
        return workplace.queue.store.get(job).state.is_final

    began, answered = events(), workplace.account.answered
    wait_until(lambda: events() > began and workplace.account.answered > answered, ended)
    calls = len(service.calls) + fewest_calls
    wait_until(lambda: len(service.calls) >= calls, ended)


def test_a_job_that_is_killed_at_random_moments_pays_for_no_story_twice_and_stops_at_its_cap(
    workplace: Workplace, service: GroqService
) -> None:
    cap_usd, numbers = 0.10, random.Random(0)
    workplace.start()
    service.latency_s = 0.2
    job = workplace.enqueue(100_000, cap_usd)
    for number in range(KILLS):
        under_way(workplace, service, job, fewest_calls=numbers.randrange(30))
        # Mostly the process of the job; sometimes its worker, or both.
        if number % 5 != 3 and (process := workplace.process()):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if number % 5 >= 3:
            workplace.end()
            workplace.start()
    record = workplace.wait(job)
    account = workplace.account
    assert record.state is JobState.FAILED and record.reason.startswith("The cap of $0.10 is reached: "), record.reason
    assert record.attempt > KILLS
    # No question was charged twice, and nothing was charged that the ledger does not count.
    assert set(service.charged().values()) == {1}
    assert service.bill_usd <= account.spent_usd <= Decimal(str(cap_usd))
    # What the ledger counts beyond the answers is the worst case of calls whose answers were lost; some never arrived.
    lost = len(service.calls) - account.answered
    assert not account.refused and 0 <= lost <= len(account.open_usd) <= 8 * record.attempt
    assert account.spent_usd == account.answered_usd + sum(account.open_usd.values(), Decimal(0))
    # Not one call more would have fitted under the cap.
    most_usd = max(PRICES.cost(most_usage(draw_prompt(n).messages(), MAX_TOKENS)) for n in range(100))
    assert Decimal(str(cap_usd)) - account.spent_usd < most_usd * Decimal("1.01")
    found = read_stories(workplace.folder)
    assert len(found) == len({story.key for story in found}) == account.answered > KILLS


def test_a_job_that_pauses_gives_its_worker_to_another_and_goes_on(
    workplace: Workplace, service: GroqService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groq_service, "DAY_WAIT", "10s")
    workplace.start()
    service.script.extend([Outcome.ANSWER, Outcome.DAY_LIMIT])
    job, other = workplace.enqueue(5, 1.0), workplace.enqueue(5, 1.0, "other")
    assert [workplace.wait(each).state for each in (job, other)] == 2 * [JobState.FINISHED]
    (reason,) = [
        event.reason
        for event in events_of(workplace.queue, job)
        if isinstance(event, StateChanged) and event.state is JobState.QUEUED and event.reason
    ]
    assert reason.startswith("The limit of tokens per day at Groq is reached. The job goes on at ")
    began = {each: _running_since(workplace, each) for each in (job, other)}
    assert began[job][0] < began[other][0] < began[job][1] and len(began[job]) == 2
    # Both sets have asked the same questions.
    assert workplace.account.answered == 5 and set(service.charged().values()) == {2}


def _running_since(workplace: Workplace, job: str) -> list[float]:
    timed = (each for _, each in workplace.queue.store.read_events(job))
    return [
        each.time for each in timed if isinstance(each.event, StateChanged) and each.event.state is JobState.RUNNING
    ]


def test_a_worker_that_is_stopped_keeps_the_answers_that_are_on_their_way(
    workplace: Workplace, service: GroqService
) -> None:
    service.latency_s = 0.2
    workplace.start()
    job = workplace.enqueue(100_000, 1.0)
    wait_until(lambda: len(service.calls) > 20)
    workplace.end(signal.SIGTERM)
    record, account = workplace.queue.store.get(job), workplace.account
    assert (record.state, record.attempt) == (JobState.QUEUED, 2)
    assert not account.open_usd and account.answered == len(service.calls)
    assert account.spent_usd == service.bill_usd


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"GROQ_API_KEY": ""}, "There is no key for Groq: set GROQ_API_KEY, or GPTLOOP_GROQ_KEY_FILE to a file that"),
        ({"GROQ_API_KEY": "gsk_wrong"}, "Groq does not know the key: correct GROQ_API_KEY or GPTLOOP_GROQ_KEY_FILE."),
    ],
)
def test_a_job_without_a_valid_key_fails_with_a_sentence(
    workplace: Workplace, service: GroqService, environment: dict[str, str], sentence: str
) -> None:
    workplace.environment |= environment
    workplace.start()
    record = workplace.wait(workplace.enqueue(5, 1.0))
    assert record.state is JobState.FAILED and record.reason.startswith(sentence)
    assert record.attempt == 1 and service.bill_usd == 0 and "gsk_wrong" not in workplace.log
