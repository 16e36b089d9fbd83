"""The calls of operators over real gRPC: listing versions and changing which one serves."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from inference_service.client import AdminClient, Credentials
from shared import errors
from shared.pb.inference.v1 import inference_pb2 as pb
from tests.decoders import default_weights
from tests.fakes import TINY, publish_tiny_version
from tests.inference_service.operated import TOKEN, Operated
from tests.inference_service.process import Server
from tests.records import write_record
from tests.waiting import wait_until

pytestmark = pytest.mark.slow

# Enough context for a stream that lasts until it is cancelled.
LONG = replace(TINY, context_length=16384)


def test_the_list_describes_every_version(operated: Operated) -> None:
    before = operated.publish_serving()
    number = operated.publish_serving(config=LONG)
    manifest = operated.server.registry.version(number)
    with operated.stream():
        answer = operated.admin.versions()
    assert [one.version for one in answer.versions] == list(range(1, number + 1))
    assert answer.policy == "best"
    status = answer.versions[-1]
    assert (status.state, status.reason) == (pb.VERSION_STATE_SERVING, "")
    assert (list(status.labels), status.streams, status.held) == (["best", "latest"], 1, False)
    assert status.memory_bytes > 4 * manifest.parameters
    assert (status.claimed_loss, status.validation_loss) == (manifest.claimed_loss, manifest.validation_loss)
    assert 0 < abs(status.measured_loss - manifest.claimed_loss) < 0.02
    assert (status.bits_per_byte, status.step, status.digest) == (manifest.bits_per_byte, 100 * number, manifest.digest)
    assert abs(status.created_at.ToMilliseconds() / 1000 - manifest.created_at) < 0.001
    old = answer.versions[before - 1]
    assert (old.state, list(old.labels), old.streams) == (pb.VERSION_STATE_RESIDENT, [], 0)
    assert old.HasField("measured_loss") and old.weight_format == default_weights()
    wait_until(lambda: operated.status(number).streams == 0)


def test_the_list_and_the_model_have_the_figures_of_the_evaluation(operated: Operated) -> None:
    version = operated.server.registry.version(operated.publish_serving())
    assert operated.admin.versions().best_by == pb.BEST_BY_TRAINING
    assert not operated.status(version.version).HasField("evaluation")
    with operated.server.client() as client:
        assert not client.model().HasField("evaluation")
        write_record(operated.server.registry, version, 1.5, "a1", 100.5, interval={"low": 1.9, "high": 2.1})
        figures = client.model().evaluation
        assert client.model(version=1).HasField("evaluation") is False
    assert (figures.method_digest, figures.measured_at.ToMilliseconds(), figures.tokens) == ("a1", 100_500, 1000)
    assert (figures.nats_per_token, figures.nats_per_token_low, figures.nats_per_token_high) == (2.0, 1.9, 2.1)
    assert (figures.perplexity, figures.bits_per_byte) == (7.4, 1.5)
    assert operated.status(version.version).evaluation == figures
    write_record(operated.server.registry, version, 1.5, "a1", 101.0)
    figures = operated.status(version.version).evaluation
    assert not figures.HasField("nats_per_token_low") and not figures.HasField("nats_per_token_high")


def test_an_unexamined_version_has_no_measured_loss(operated: Operated) -> None:
    serving = operated.publish_serving()
    operated.admin.set_policy(f"pinned:{serving}")
    status = operated.status(operated.publish().version)
    assert (status.state, status.HasField("measured_loss")) == (pb.VERSION_STATE_AVAILABLE, False)
    assert status.weight_format == ""
    assert status.claimed_loss > 0


def test_a_refused_version_is_listed_with_its_reason_and_never_serves(operated: Operated) -> None:
    serving = operated.publish_serving()
    refused_before = operated.server.metrics().get(("gptloop_inference_refused_versions_total", "loss_mismatch"), 0)
    number = operated.publish(better_by=0.5).version
    wait_until(lambda: operated.state(number) == "REFUSED")
    status = operated.status(number)
    sentence = (
        f"it claims a held-out loss of {status.claimed_loss:.4f} nats a token, "
        f"but has {status.measured_loss:.4f} as served in {default_weights()}"
    )
    assert status.reason == f"loss_mismatch: {sentence}"
    assert (list(status.labels), status.memory_bytes) == ([], 0)
    assert abs(status.measured_loss - status.claimed_loss - 0.5) < 0.02
    assert operated.answering() == serving
    attempts: list[Callable[[], object]] = [
        lambda: operated.answering(version=number),
        lambda: operated.admin.load(number),
        lambda: operated.admin.promote(number),
        lambda: operated.admin.set_policy(f"pinned:{number}"),
        lambda: operated.admin.roll_back(number),
    ]
    for attempt in attempts:
        with pytest.raises(errors.FailedPrecondition, match=f"Version {number} cannot serve: {sentence}"):
            attempt()
    assert operated.state(serving) == "SERVING"
    # LoadVersion examined it a second time.
    values = operated.server.metrics()
    assert values["gptloop_inference_refused_versions_total", "loss_mismatch"] == refused_before + 2


def test_a_loaded_version_stays_in_memory_until_it_is_unloaded(operated: Operated) -> None:
    first = operated.publish_serving(config=LONG)
    serving = operated.publish_serving()
    loaded = operated.admin.load(first)
    assert (loaded.version, loaded.state, loaded.held) == (first, pb.VERSION_STATE_RESIDENT, True)
    assert operated.answering(version=first) == first
    assert operated.status(first).state == pb.VERSION_STATE_RESIDENT
    assert models(operated.server) == {first: False, serving: True}
    with operated.stream(version=first):
        leaving = operated.admin.unload(first)
        assert (leaving.state, leaving.streams, leaving.held) == (pb.VERSION_STATE_RESIDENT, 1, False)
    wait_until(lambda: operated.state(first) == "AVAILABLE")
    assert models(operated.server) == {serving: True}
    with pytest.raises(errors.FailedPrecondition, match=f"Version {first} is not in memory"):
        operated.admin.unload(first)


def test_the_serving_version_can_be_held_but_not_unloaded(operated: Operated) -> None:
    serving = operated.publish_serving()
    held = operated.admin.load(serving)
    assert (held.state, held.held) == (pb.VERSION_STATE_SERVING, True)
    with pytest.raises(errors.FailedPrecondition, match=f"Version {serving} serves: pin another one, or roll back"):
        operated.admin.unload(serving)


def test_a_promoted_version_answers_requests_for_the_label_stable(operated: Operated) -> None:
    first, serving = operated.publish_serving(), operated.publish_serving()
    promoted = operated.admin.promote(first)
    assert (promoted.version, "stable" in promoted.labels) == (first, True)
    assert operated.answering(label="stable") == first
    assert operated.answering() == serving
    operated.admin.promote(serving)
    assert operated.answering(label="stable") == serving
    assert [one.version for one in operated.admin.versions().versions if "stable" in one.labels] == [serving]


def test_the_policy_stable_serves_the_promoted_version(operated: Operated) -> None:
    first, second = operated.publish_serving(), operated.publish_serving()
    operated.admin.promote(first)
    operated.admin.set_policy("stable")
    operated.await_serving(first)
    operated.admin.promote(second)
    operated.await_serving(second)
    assert operated.answering() == operated.answering(label="stable") == second


def test_a_request_can_pin_any_version(operated: Operated) -> None:
    first, serving = operated.publish_serving(), operated.publish_serving()
    assert operated.answering(label=f"pinned:{first}") == first
    assert operated.answering(label=f"pinned:{serving}") == operated.answering(label="best") == serving


def test_a_pinned_version_serves_until_the_policy_is_a_label_again(operated: Operated) -> None:
    first, second = operated.publish_serving(), operated.publish_serving()
    swaps = operated.server.metrics()["gptloop_inference_swaps_total",]
    now = operated.admin.set_policy(f"pinned:{first}")
    assert now is not None and now.version in (first, second)
    operated.await_serving(first)
    assert operated.admin.versions().policy == f"pinned:{first}"
    assert list(operated.status(first).labels) == [f"pinned:{first}"]
    newest = operated.publish().version
    wait_until(lambda: list(operated.status(newest).labels) == ["best", "latest"])
    assert operated.answering() == first
    assert models(operated.server) == {first: True, second: False}
    operated.admin.set_policy("latest")
    operated.await_serving(newest)
    assert operated.answering() == newest
    # The second version served while the newest was loaded, because the policy prefers it to the first.
    assert operated.server.metrics()["gptloop_inference_swaps_total",] == swaps + 3


def test_a_rollback_serves_the_next_best_version_and_keeps_running_streams(operated: Operated) -> None:
    first, bad = operated.publish_serving(), operated.publish_serving(config=LONG)
    before = operated.server.metrics().get(("gptloop_inference_refused_versions_total", "rolled_back"), 0)
    with operated.stream():
        after = operated.admin.roll_back()
        assert after.version == first
        operated.await_serving(first)
        status = operated.status(bad)
        assert (status.state, status.streams) == (pb.VERSION_STATE_REFUSED, 1)
        assert status.reason == "rolled_back: an operator rolled it back"
        assert streams(operated.server) == {bad: 1}
        assert models(operated.server) == {first: True, bad: False}
    assert operated.answering() == first
    assert "best" in operated.status(first).labels and operated.admin.versions().policy == "best"
    with pytest.raises(errors.FailedPrecondition, match=f"Version {bad} cannot serve: an operator rolled it back"):
        operated.answering(version=bad)
    wait_until(lambda: models(operated.server) == {first: True})
    assert operated.server.metrics()["gptloop_inference_refused_versions_total", "rolled_back"] == before + 1
    # Loading it gives it another chance, and it serves again because it is the best.
    assert operated.admin.load(bad).reason == ""
    operated.await_serving(bad)


def test_a_rollback_to_a_version_pins_it(operated: Operated) -> None:
    first, second, third = (operated.publish_serving() for _ in range(3))
    assert operated.admin.roll_back(first).version == first
    operated.await_serving(first)
    assert operated.admin.versions().policy == f"pinned:{first}"
    assert [operated.state(number) for number in (second, third)] == ["AVAILABLE", "REFUSED"]


def test_the_metrics_page_agrees_with_the_list(operated: Operated) -> None:
    first, serving = operated.publish_serving(config=LONG), operated.publish_serving(config=LONG)
    with operated.stream(), operated.stream(version=first), operated.stream(version=first):
        listed = [one for one in operated.admin.versions().versions if one.memory_bytes]
        assert streams(operated.server) == {one.version: one.streams for one in listed} == {first: 2, serving: 1}
        serves = {one.version: one.state == pb.VERSION_STATE_SERVING for one in listed}
        assert models(operated.server) == serves == {first: False, serving: True}


def models(server: Server) -> dict[int, bool]:
    """Returns the versions in memory on the metrics page, and whether they serve."""
    found: dict[int, bool] = {}
    for (name, *labels), value in server.metrics().items():
        if name == "gptloop_inference_model_info":
            # The labels are sorted: parameters, preset, run, serving, step, tokenizer, version, weights.
            version, serving = int(labels[-2]), labels[3]
            assert value == 1 and version not in found and labels[-1] == default_weights()
            found[version] = {"true": True, "false": False}[serving]
    return found


def streams(server: Server) -> dict[int, int]:
    """Returns the versions with streams on the metrics page, and how many they have."""
    name = "gptloop_inference_version_streams"
    return {int(key[1]): round(value) for key, value in server.metrics().items() if key[0] == name and value}


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda admin: admin.load(999), errors.NotFound, "There is no version 999; the labels are best"),
        (lambda admin: admin.promote(999), errors.NotFound, "There is no version 999"),
        (lambda admin: admin.set_policy("pinned:999"), errors.NotFound, "There is no version 999"),
        (lambda admin: admin.roll_back(999), errors.NotFound, "There is no version 999"),
        (lambda admin: admin.load(0), errors.InvalidArgument, "version is 0, but versions are numbered from 1"),
        (lambda admin: admin.unload(-1), errors.InvalidArgument, "version is -1, but"),
        (lambda admin: admin.promote(0), errors.InvalidArgument, "version is 0, but"),
        (lambda admin: admin.roll_back(0), errors.InvalidArgument, "version is 0, but"),
        (lambda admin: admin.load(2**63), errors.InvalidArgument, "cannot be sent: .*9223372036854775808"),
        (lambda admin: admin.load("one"), errors.InvalidArgument, "cannot be sent"),
        (lambda admin: admin.set_policy("\ud800"), errors.InvalidArgument, "cannot be sent"),
        (
            lambda admin: admin.set_policy("newest"),
            errors.InvalidArgument,
            "'newest' is not a label; the labels are best, latest, stable, run:<name> and pinned:<version>",
        ),
        (lambda admin: admin.set_policy(""), errors.InvalidArgument, "'' is not a label"),
        (lambda admin: admin.set_policy("pinned:0"), errors.InvalidArgument, "'pinned:0' is not a label"),
    ],
)
def test_an_invalid_call_raises_its_error_and_changes_nothing(
    operated: Operated, call: Callable[[AdminClient], object], kind: type[Exception], sentence: str
) -> None:
    operated.admin.set_policy("best")
    wait_until(lambda: any(one.state == pb.VERSION_STATE_SERVING for one in operated.admin.versions().versions))
    before = operated.admin.versions()
    with pytest.raises(kind, match=sentence):
        call(operated.admin)
    assert operated.admin.versions() == before


def test_a_server_without_a_token_accepts_every_operator(tmp_path: Path) -> None:
    server = Server(tmp_path / "var")
    try:
        # A needless token does no harm.
        with AdminClient(server.address) as admin, AdminClient(server.address, Credentials(token=TOKEN)) as other:
            answer = admin.versions()
            assert (list(answer.versions), answer.policy) == ([], "best")
            assert admin.set_policy("latest") is None
            assert other.versions().policy == "latest"
            for call, kind, sentence in (
                (admin.roll_back, errors.FailedPrecondition, "No version serves"),
                (lambda: admin.set_policy("stable"), errors.FailedPrecondition, "No version is stable yet"),
                (lambda: admin.load(1), errors.NotFound, "There is no version 1; the registry is still empty"),
            ):
                with pytest.raises(kind, match=sentence):
                    call()
            publish_tiny_version(server.registry, 1.0)
            wait_until(server.serves)
            with pytest.raises(errors.FailedPrecondition, match="There is no other version than 1 that could serve"):
                admin.roll_back()
            with pytest.raises(errors.FailedPrecondition, match="Version 1 serves already"):
                admin.roll_back(1)
            assert admin.versions().versions[0].state == pb.VERSION_STATE_SERVING
    finally:
        assert server.end() == 0
        assert "Traceback" not in "".join(server.lines)
