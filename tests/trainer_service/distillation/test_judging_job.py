"""Evaluations with a judge as their users run them: real commands, a real Redis and worker, a local service."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import groq_service
from tests.groq_service import KEY, GroqService, Outcome
from tests.redis_process import PROJECT, RedisServer
from tests.registries import evaluation_folder
from tests.trainer_service.distillation.judging import answering, fair
from tests.trainer_service.distillation.workplace import Workplace
from tests.trainer_service.site import Site
from tests.waiting import HANG_S, wait_until
from trainer_service.evaluation.judged import frozen_pairs
from trainer_service.evaluation.record import Record
from trainer_service.jobs.events import JobState
from trainer_service.jobs.specs import EvaluateSpec
from trainer_service.text.corpus import DatasetSpec

pytestmark = pytest.mark.slow

# Sixteen beginnings with two seeds, in both orders.
QUESTIONS = 4 * 16 + len(frozen_pairs())


@pytest.fixture
def workplace(site: Site, mortal_redis: RedisServer, service: GroqService) -> Iterator[Workplace]:
    """A worker beside three versions, and a service that judges them."""
    site.train(site.spec())
    service.write = answering(fair)
    workplace = Workplace(site.directories.var, mortal_redis, service)
    workplace.start()
    yield workplace
    workplace.end()
    assert KEY not in workplace.log


def record_of(site: Site, version: int) -> Record:
    (path,) = evaluation_folder(site.registry, version).glob("*.json")
    return Record.from_json(path.read_text())


def test_the_command_pays_for_a_judge_within_its_limit(site: Site, workplace: Workplace, service: GroqService) -> None:
    wait_until(lambda: workplace.queue.store.workers.count() > 0)
    command = [sys.executable, "-m", "deploy.cli", "eval", "1", "3", "--no-speed", "--judge", "0.50"]
    ended = subprocess.run(
        command, cwd=PROJECT, env=workplace.environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert ended.returncode == 0, ended
    first, last = json.loads(ended.stdout.splitlines()[-1])["versions"]
    assert first["judged"] == [] and last["verdict"] is None
    (judged,) = last["judged"]
    assert (judged["rival"]["number"], judged["pairs"], judged["calibration"], judged["unanswered"]) == (1, 32, 1.0, {})
    assert 0 < service.bill_usd <= 0.5 and judged["cost_usd"] == pytest.approx(float(service.bill_usd))
    assert len(service.calls) == QUESTIONS and "Judged by a large teacher" in ended.stdout
    assert record_of(site, 3).judged[0].rival.number == 1


def test_a_job_that_pauses_goes_on_with_the_version_that_its_label_named(
    site: Site, workplace: Workplace, service: GroqService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groq_service, "DAY_WAIT", "3s")
    service.script.extend([Outcome.ANSWER, Outcome.DAY_LIMIT])
    site.registry.decisions.set_stable(2)
    spec = EvaluateSpec("stable", DatasetSpec(()), speed=False, rivals={"first": "1"}, judge_usd=0.5)
    job = workplace.queue.enqueue(spec).id
    wait_until(lambda: workplace.queue.store.get(job).attempt == 2)
    assert site.registry.holds.jobs() == {1: job, 2: job}
    site.registry.decisions.set_stable(3)
    assert workplace.wait(job).state is JobState.FINISHED
    assert record_of(site, 2).judged[0].unanswered == {}
    assert not list(evaluation_folder(site.registry, 3).glob("*.json"))
    assert len(service.charged()) == QUESTIONS and set(service.charged().values()) == {1}
