from pathlib import Path

import pytest
from typer.testing import CliRunner

from shared.errors import FailedPrecondition, InvalidArgument, NotFound
from shared.registry.registry import Registry
from tests.fakes import publish_tiny_version
from tests.redis_process import RedisServer
from tests.registries import disk_registry, registry_id, root_of
from tests.trainer_service.site import Site
from trainer_service.commands.evaluation import app, requests
from trainer_service.jobs.queue import JobQueue
from trainer_service.jobs.requests import EvaluateRequest

COMMON = EvaluateRequest(pairs=("pairs.jsonl",), again=True)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return disk_registry(tmp_path)


def named(found: list[EvaluateRequest]) -> list[str]:
    return [request.version for request in found]


def test_without_words_the_best_version_is_compared_with_the_one_before_it(registry: Registry) -> None:
    with pytest.raises(NotFound):
        requests([], COMMON, registry)
    publish_tiny_version(registry, 3.0)
    assert named(requests([], COMMON, registry)) == ["1"]
    publish_tiny_version(registry, 2.0)
    publish_tiny_version(registry, 1.0)
    assert named(requests([], COMMON, registry)) == ["2", "3"]


def test_each_version_is_evaluated_once_in_the_given_order(registry: Registry) -> None:
    for bits_per_byte in (3.0, 1.0, 2.0):
        publish_tiny_version(registry, bits_per_byte)
    found = requests(["3", "best", "2", "1"], COMMON, registry)
    assert named(found) == ["3", "2", "1"]
    assert all((each.pairs, each.again) == (COMMON.pairs, True) for each in found)
    with pytest.raises(NotFound, match="There is no version 9"):
        requests(["1", "9"], COMMON, registry)
    with pytest.raises(InvalidArgument, match="The version is 'newest', but must be a number or a label"):
        requests(["newest"], COMMON, registry)


@pytest.mark.slow
def test_compared_versions_have_a_window_and_a_text_in_common(site: Site) -> None:
    site.train(site.spec(max_steps="3"))
    site.train(site.spec(max_steps="3", dataset=site.other_text, context_length="8"))
    found = requests(["1", "2"], COMMON, site.registry)
    assert [(each.window, each.dataset) for each in found] == [(8, (site.text,))] * 2
    (alone,) = requests(["2"], COMMON, site.registry)
    assert (alone.window, alone.dataset) == (0, ())
    given = EvaluateRequest(validation=("held-out.txt",))
    assert [each.dataset for each in requests(["1", "2"], given, site.registry)] == [(), ()]


def test_a_version_that_another_job_makes_is_evaluated_alone(registry: Registry) -> None:
    after = EvaluateRequest(after=("3f2a91c4",))
    assert named(requests([], after, registry)) == ["best"]
    assert named(requests(["latest"], after, registry)) == ["latest"]
    with pytest.raises(InvalidArgument, match="--after takes one version"):
        requests(["1", "2"], after, registry)


def test_the_last_version_is_judged_beside_the_others(registry: Registry) -> None:
    for bits_per_byte in (3.0, 1.0, 2.0):
        publish_tiny_version(registry, bits_per_byte)
    judged = EvaluateRequest(judge_usd=0.5)
    found = requests(["3", "1", "2"], judged, registry)
    assert [each.judge_usd for each in found] == [0.0, 0.0, 0.5]
    assert [dict(each.rivals) for each in found] == [{}, {}, {"rival 3": "3", "rival 1": "1"}]
    assert all(not each.rivals for each in requests(["3", "1"], COMMON, registry))
    with pytest.raises(InvalidArgument, match="--judge needs two versions or more"):
        requests(["3", "3"], judged, registry)
    with pytest.raises(InvalidArgument, match="--judge compares versions that exist"):
        requests(["latest"], EvaluateRequest(judge_usd=0.5, after=("3f2a91c4",)), registry)


def test_nothing_is_queued_if_one_of_the_requests_is_refused(tmp_path: Path, redis_server: RedisServer) -> None:
    registry = disk_registry(tmp_path / "registry")
    for bits_per_byte in (3.0, 1.0):
        publish_tiny_version(registry, bits_per_byte)
    groq = {"GROQ_API_KEY": "gsk_test", "GPTLOOP_GROQ_INPUT_USD": "0.1", "GPTLOOP_GROQ_OUTPUT_USD": "0.1"}
    environment = {"GPTLOOP_VAR": str(tmp_path), "REDIS_URL": redis_server.url, **groq}
    with pytest.raises(InvalidArgument, match=r"judge_usd is 20000\.0, but must be an amount above 0 and up to 10,000"):
        CliRunner().invoke(app, ["1", "2", "--judge", "20000"], env=environment, catch_exceptions=False)
    assert not list(JobQueue(redis_server.connect(), registry_id(root_of(registry))).store.jobs())


@pytest.mark.parametrize(
    ("price", "sentence"), [("", "GPTLOOP_GROQ_INPUT_USD is not set"), ("0.1", "There is no key for Groq")]
)
def test_a_judge_without_prices_or_a_key_is_refused_before_anything_is_queued(
    tmp_path: Path, price: str, sentence: str
) -> None:
    names = ("GROQ_API_KEY", "GPTLOOP_GROQ_KEY_FILE", "GPTLOOP_GROQ_INPUT_USD", "GPTLOOP_GROQ_OUTPUT_USD")
    environment = {"GPTLOOP_VAR": str(tmp_path), **dict(zip(names, ("", "", price, price), strict=True))}
    with pytest.raises(FailedPrecondition, match=sentence):
        CliRunner().invoke(app, ["3", "7", "--judge", "0.5"], env=environment, catch_exceptions=False)
