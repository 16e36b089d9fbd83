"""The teacher as a judge: from records to its verdict, through the real client and a local service."""

import os
import random
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from functools import partial

import pytest

from tests.groq_service import GroqService, Outcome
from tests.registries import evaluation_folder
from tests.trainer_service.distillation.judging import (
    BEGINNINGS,
    LIMIT_USD,
    RIVAL,
    VERSION,
    answer,
    answering,
    fair,
    judge,
    record,
)
from tests.trainer_service.site import Site
from tests.waiting import wait_until
from tests.workplace import PROJECT
from trainer_service.distillation.groq_settings import GroqSettings
from trainer_service.distillation.judgement import (
    TEMPLATE,
    judge_version,
    read_opinion,
)
from trainer_service.distillation.ledger import read_account
from trainer_service.evaluation.job import evaluate_version
from trainer_service.evaluation.judged import Opinion, Winner, frozen_pairs
from trainer_service.evaluation.record import Grades, Record, Verdict
from trainer_service.jobs.attempt import Attempt, Paused, Stopped
from trainer_service.jobs.events import Evaluation, Notice
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.corpus import DatasetSpec

# Two seeds a beginning, two orders a pair.
QUESTIONS = 4 * BEGINNINGS + len(frozen_pairs())


@pytest.fixture
def attempt(site: Site, service: GroqService) -> Attempt:
    service.write = answering(fair)
    return replace(site.attempt(), groq=service.settings)


def notices(site: Site) -> list[str]:
    return [event.text for event in site.all_told(Notice)]


def test_a_fair_judge_finds_the_better_version(attempt: Attempt, service: GroqService) -> None:
    (found,) = judge(attempt)
    assert found.win_rate == pytest.approx(11 / 12) and found.verdict is Verdict.BETTER
    assert (found.agreement, found.calibration, found.judged, found.unanswered) == (1.0, 1.0, 24, {})
    assert (found.model, found.template, found.fingerprints) == (service.settings.model, TEMPLATE, ("fp_local",))
    assert found.grades == Grades(8, 7, 6)
    assert found.cost_usd == pytest.approx(float(service.bill_usd))
    assert len(service.calls) == len(service.charged()) == QUESTIONS


def test_a_judge_that_always_says_a_agrees_with_itself_about_nothing(attempt: Attempt, service: GroqService) -> None:
    frozen = {each.question for each in frozen_pairs()}
    service.write = answering(lambda question: fair(question) if question in frozen else Winner.A)
    (found,) = judge(attempt)
    assert (found.agreement, found.win_rate, found.verdict) == (0.0, 0.5, None)
    assert "said the same in both orders about 0.0% of the pairs" in found.no_verdict


def test_a_judge_that_guesses_gets_no_verdict(attempt: Attempt, service: GroqService) -> None:
    drawn = random.Random(3)
    service.write = answering(lambda _: drawn.choice(list(Winner)))
    (found,) = judge(attempt)
    assert found.verdict is None and "pairs whose better text is known" in found.no_verdict


def test_a_judgement_is_paid_for_once_whichever_version_is_named_first(attempt: Attempt, service: GroqService) -> None:
    (first,) = judge(attempt)
    (again,) = judge(attempt)
    (mirrored,) = judge_version(RIVAL, [VERSION], LIMIT_USD, attempt)
    assert again == first and len(service.calls) == QUESTIONS
    assert mirrored.win_rate == pytest.approx(1 / 12) and mirrored.verdict is Verdict.WORSE
    assert mirrored.rival == VERSION.version


def test_only_questions_about_other_texts_are_asked_again(attempt: Attempt, service: GroqService) -> None:
    judge(attempt)
    judge_version(record(7, lambda at: "a long story" if at > 1 else "short"), [RIVAL], LIMIT_USD, attempt)
    assert len(service.calls) == QUESTIONS + 4


@pytest.mark.parametrize("limit_usd", [Decimal(0), Decimal("0.001"), Decimal("0.0025")])
def test_the_limit_is_kept_and_a_higher_one_continues(
    site: Site, attempt: Attempt, service: GroqService, limit_usd: Decimal
) -> None:
    found = judge(attempt, limit_usd=limit_usd)
    asked = len(service.calls)
    assert service.bill_usd <= limit_usd and asked < QUESTIONS
    assert any("has ended the judgement of version 7; with a higher one" in text for text in notices(site))
    if found:
        assert found[0].verdict is None and found[0].unanswered == {"not asked": QUESTIONS - asked}
    (whole,) = judge(attempt)
    assert whole.verdict is Verdict.BETTER and len(service.calls) == len(service.charged()) == QUESTIONS


def test_the_limit_counts_all_rivals(attempt: Attempt, service: GroqService) -> None:
    other = record(5, lambda at: "words")
    both = judge(attempt, [RIVAL, other])
    assert [each.rival.number for each in both] == [3, 5]
    assert service.bill_usd == pytest.approx(Decimal(str(sum(each.cost_usd for each in both))))
    third = record(4, lambda at: "one")
    limit_usd = service.bill_usd + Decimal("0.002")
    judge(attempt, [RIVAL, other, third], limit_usd)
    assert service.bill_usd <= limit_usd and 2 * QUESTIONS < len(service.calls) < 3 * QUESTIONS


def test_answers_that_cannot_be_used_are_counted_and_never_guessed(attempt: Attempt, service: GroqService) -> None:
    service.script.extend([Outcome.ANSWER, Outcome.EMPTY, Outcome.TRUNCATED, Outcome.MALFORMED, Outcome.NOT_VALID])
    (found,) = judge(attempt)
    assert found.unanswered == {"empty": 1, "truncated": 1, "malformed": 2}
    assert found.cost_usd >= float(service.bill_usd)
    assert len(service.calls) == QUESTIONS
    (again,) = judge(attempt)
    assert again == found and len(service.calls) == QUESTIONS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "{}",
        '{"winner": "A"}',
        answer(Winner.A).replace('"A"', '"a"'),
        answer(Winner.A, grammar=11),
        answer(Winner.A, creativity=0),
        answer(Winner.A).replace("8", "8.5"),
        answer(Winner.A).replace("8", '"8"'),
        answer(Winner.A)[:-1] + ', "why": "because"}',
    ],
)
def test_text_of_another_form_is_no_opinion(text: str) -> None:
    assert read_opinion(text) is None


def test_an_answer_is_an_opinion() -> None:
    assert read_opinion(answer(Winner.TIE)) == Opinion(Winner.TIE, Grades(8, 7, 6), Grades(8, 7, 6))


def test_a_short_limit_of_the_account_is_waited_for(attempt: Attempt, service: GroqService) -> None:
    service.script.extend([Outcome.MINUTE_LIMIT, Outcome.ANSWER, Outcome.UNAVAILABLE])
    (found,) = judge(attempt)
    assert found.verdict is Verdict.BETTER and found.unanswered == {}
    assert len(service.charged()) == QUESTIONS


def test_the_limit_of_a_day_pauses_the_job_which_continues_later(attempt: Attempt, service: GroqService) -> None:
    service.script.extend([*[Outcome.ANSWER] * 10, Outcome.DAY_LIMIT])
    with pytest.raises(Paused):
        judge(attempt)
    (found,) = judge(attempt)
    assert found.verdict is Verdict.BETTER and max(service.charged().values()) == 1


def test_a_wrong_key_is_a_sentence_and_no_judgement(site: Site, attempt: Attempt, service: GroqService) -> None:
    wrong = replace(attempt, groq=replace(service.settings, key="gsk_wrong"))
    assert judge(wrong) == []
    (text,) = notices(site)
    assert text.startswith("Groq does not know the key") and "gsk_wrong" not in text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (GroqSettings(input_usd=Decimal(1), output_usd=Decimal(1)), "There is no key for Groq"),
        (GroqSettings("gsk_any", output_usd=Decimal(1)), "GPTLOOP_GROQ_INPUT_USD is not set"),
    ],
)
def test_without_a_key_or_a_price_nothing_is_asked(
    site: Site, service: GroqService, settings: GroqSettings, sentence: str
) -> None:
    assert judge(replace(site.attempt(), groq=replace(settings, url=service.url))) == []
    assert notices(site)[0].startswith(sentence) and not service.calls


def test_a_rival_of_another_method_is_named_and_the_others_are_judged(site: Site, attempt: Attempt) -> None:
    other = replace(record(5, lambda at: "words"), method=replace(RIVAL.method, window=64))
    (found,) = judge(attempt, [other, RIVAL])
    assert found.rival.number == 3
    assert notices(site)[0].startswith("Version 7 is not judged beside version 5, because their evaluations differ")


def test_work_that_is_stopped_continues(site: Site, service: GroqService) -> None:
    service.write = answering(fair)
    stopping = replace(site.attempt(lambda: len(service.calls) > 20), groq=service.settings)
    with pytest.raises(Stopped):
        judge(stopping)
    assert 20 < len(service.calls) < QUESTIONS
    (found,) = judge(replace(site.attempt(), groq=service.settings))
    assert found.verdict is Verdict.BETTER and found.unanswered == {}
    assert len(service.calls) == len(service.charged()) == QUESTIONS


def has_asked(service: GroqService, questions: int) -> bool:
    return len(service.calls) >= questions


def has_ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


@pytest.mark.slow
def test_a_process_that_is_killed_anywhere_pays_for_nothing_twice(
    site: Site, attempt: Attempt, service: GroqService
) -> None:
    service.latency_s = 0.005
    command = [sys.executable, "-m", "tests.trainer_service.distillation.judging", str(site.directories.var.parent)]
    kills = (1, 9, 30, 50)
    for asked in kills:
        process = subprocess.Popen(command, cwd=PROJECT, env=os.environ | service.environment)
        wait_until(partial(has_asked, service, asked), partial(has_ended, process))
        process.kill()
        process.wait()
    (found,) = judge(attempt)
    charged = service.charged()
    assert max(charged.values()) == 1
    # Eight questions at most wait for their answers at a time.
    lost = found.unanswered.get("lost", 0)
    assert set(found.unanswered) == {"lost"} and lost <= 8 * len(kills)
    assert len(charged) >= QUESTIONS - lost
    (folder,) = (site.directories.data / "judgements").iterdir()
    assert service.bill_usd <= read_account(folder).spent_usd


@pytest.mark.slow
def test_an_evaluation_keeps_what_the_judge_says_in_the_record(site: Site, service: GroqService) -> None:
    site.train(site.spec())
    service.write = answering(fair)
    attempt = replace(site.attempt(), groq=service.settings)
    spec = EvaluateSpec("3", DatasetSpec(()), speed=False, rivals={"rival 1": "1", "rival 2": "2"}, judge_usd=0.5)
    evaluate_version(spec, attempt)

    def kept() -> Record:
        (path,) = evaluation_folder(site.registry, 3).glob("*.json")
        return Record.from_json(path.read_text())

    record = kept()
    assert [each.rival.number for each in record.judged] == [1, 2] and "judged" in record.measured_at
    assert all(each.pairs == 32 and each.calibration == 1.0 and each.agreement == 1.0 for each in record.judged)
    assert not any(each.no_verdict for each in record.judged)
    calls = len(service.calls)
    # Sixteen beginnings; the frozen pairs are asked beside each rival.
    assert calls == 2 * (4 * 16 + len(frozen_pairs()))
    # Measuring again gives the same texts on a CPU, so that nothing is asked again; other rivals' judgements stay.
    evaluate_version(replace(spec, rivals={"rival 1": "1"}, since=max(record.measured_at.values()) + 1e-6), attempt)
    assert [each.rival.number for each in kept().judged] == [1]
    evaluate_version(replace(spec, rivals={"rival 2": "2"}), attempt)
    assert list(kept().judged) == list(record.judged) and len(service.calls) == calls


@pytest.mark.slow
def test_an_evaluation_without_a_key_is_complete_but_for_the_judge(site: Site, service: GroqService) -> None:
    site.train(site.spec())
    spec = EvaluateSpec("3", DatasetSpec(()), speed=False, rivals={"rival": "1"}, judge_usd=0.5)
    evaluate_version(spec, replace(site.attempt(), groq=replace(service.settings, key="")))
    assert site.all_told(Evaluation) and any(text.startswith("There is no key for Groq") for text in notices(site))
    (path,) = evaluation_folder(site.registry, 3).glob("*.json")
    record = Record.from_json(path.read_text())
    assert record.writing is not None and record.judged == () and not service.calls


@pytest.mark.slow
def test_a_version_is_promoted_once_and_only_after_the_judge(site: Site, service: GroqService) -> None:
    for rate in ("0.000001", "0.003"):
        site.train(site.spec(max_steps="40", evaluation_interval="40", learning_rate=rate))
    service.write = answering(fair)
    service.script.extend([*[Outcome.ANSWER] * 10, Outcome.DAY_LIMIT])
    spec = EvaluateSpec("2", DatasetSpec(()), speed=False, rivals={"control": "1"}, promote=True, judge_usd=0.5)
    attempt, stable = replace(site.attempt(), groq=service.settings, job="1234abcd"), site.registry.decisions.stable
    with pytest.raises(Paused):
        evaluate_version(spec, attempt)
    assert stable() is None
    evaluate_version(spec, attempt)
    assert stable() == 2
    # What an operator chooses afterwards is not changed by an attempt that comes late, but by another evaluation.
    site.registry.decisions.set_stable(1)
    evaluate_version(spec, attempt)
    assert stable() == 1
    evaluate_version(spec, replace(attempt, job="5678abcd"))
    assert stable() == 2
