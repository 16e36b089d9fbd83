"""The command `gptloop stories`, with a real Redis and without a worker."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from shared.errors import FailedPrecondition, InvalidArgument, Unavailable
from shared.service.settings import Directories
from tests.redis_process import RedisServer
from tests.registries import registry_id
from trainer_service.commands.stories import app
from trainer_service.jobs.local_files import place_of
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.specs import StoriesSpec

ENVIRONMENT = {
    "GROQ_API_KEY": "gsk_test",
    "GPTLOOP_GROQ_KEY_FILE": "",
    "GPTLOOP_GROQ_INPUT_USD": "0.075",
    "GPTLOOP_GROQ_OUTPUT_USD": "0.30",
}
ASKED = ("animals", "--count", "2000", "--max-cost", "0.50", "--no-follow")


def run(var: Path, redis: str, *arguments: str, **environment: str) -> Result:
    given = {"GPTLOOP_VAR": str(var), "REDIS_URL": redis, **ENVIRONMENT, **environment}
    return CliRunner().invoke(app, arguments, env=given)


def test_the_command_shows_what_stories_will_cost_and_queues_a_job(tmp_path: Path, redis_server: RedisServer) -> None:
    ended = run(tmp_path, redis_server.url, *ASKED)
    assert isinstance(ended.exception, Unavailable)  # no worker is running
    estimate, queued = ended.output.splitlines()
    assert estimate.startswith("2,000 more stories by openai/gpt-oss-20b cost typically $0.30")
    assert "the cap of $0.50 typically pays for 2,000 of them, and surely for 1," in estimate
    assert queued.endswith(" queued: stories stories animals")
    queue = JobQueue(redis_server.connect(), registry_id(Directories(tmp_path).registry))
    (record,) = queue.store.jobs()
    assert record.spec == StoriesSpec("animals", 2000, 0.5, place=place_of(tmp_path / "data"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("GROQ_API_KEY", "There is no key for Groq"),
        ("GPTLOOP_GROQ_INPUT_USD", "GPTLOOP_GROQ_INPUT_USD is not set"),
        ("GPTLOOP_GROQ_OUTPUT_USD", "GPTLOOP_GROQ_OUTPUT_USD is not set"),
    ],
)
def test_without_a_key_or_prices_nothing_is_queued(tmp_path: Path, name: str, sentence: str) -> None:
    ended = run(tmp_path, "unix:///none.sock", *ASKED, **{name: ""})
    assert isinstance(ended.exception, FailedPrecondition) and str(ended.exception).startswith(sentence)


def test_an_amount_that_is_too_fine_is_refused(tmp_path: Path) -> None:
    ended = run(tmp_path, "unix:///none.sock", "--count", "5", "--max-cost", "0.0000001")
    assert isinstance(ended.exception, InvalidArgument)
