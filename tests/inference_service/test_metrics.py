import time
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from inference_service.metrics import InferenceMetrics, TokenRate
from inference_service.versions.resident import Resident
from shared.decoding.weight_format import WeightFormat
from shared.device.accelerator import Memory
from shared.registry.evaluations import Figures
from shared.registry.manifest import VersionManifest
from tests.fakes import byte_tokenizer, publish_tiny_version
from tests.registries import disk_registry


def in_memory(*manifests: VersionManifest) -> list[Resident]:
    return [Resident(each, byte_tokenizer(), 1.0, 0, WeightFormat.INT8) for each in manifests]


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> InferenceMetrics:
    return InferenceMetrics(registry, lambda: Memory(1, 2, 3, 4), lambda: 5, lambda: 0, {"resident": 6})


def test_the_page_shows_what_was_recorded(metrics: InferenceMetrics, registry: CollectorRegistry) -> None:
    metrics.accepted(7)
    record = metrics.tokens_of(7, arrived=1.0)
    record(0, (1.25,))
    record(0, (1.5,))
    metrics.cached(3)
    metrics.called("Generate", grpc.StatusCode.OK, "LENGTH")
    metrics.called("Generate", grpc.StatusCode.INVALID_ARGUMENT, None)
    metrics.called("Tokenize", grpc.StatusCode.OK, None)
    metrics.ended("STOP")
    metrics.answered_over_http(404)
    metrics.health(True)
    metrics.refused("corrupt")
    values = page(registry)
    prefix = "gptloop_inference"
    assert values[f"{prefix}_generated_tokens_total",] == 2
    assert values[f"{prefix}_prompt_tokens_total",] == 7
    assert values[f"{prefix}_cached_prompt_tokens_total",] == 3
    assert (values[f"{prefix}_compiled_shapes",], values[f"{prefix}_active_streams",]) == (5, 0)
    assert values[f"{prefix}_tokens_per_second",] > 0
    assert values[f"{prefix}_time_to_first_token_seconds_sum",] == 0.25
    assert values[f"{prefix}_inter_token_latency_seconds_count",] == 1
    reasons = {name[1]: value for name, value in values.items() if name[0] == f"{prefix}_requests_total" and value}
    assert reasons == {"length": 1, "invalid_argument": 1, "stop": 1}
    assert (values[f"{prefix}_http_requests_total", "200"], values[f"{prefix}_http_requests_total", "404"]) == (0, 1)
    assert (values[f"{prefix}_healthy",], values[f"{prefix}_memory_limit_bytes", "resident"]) == (1, 6)
    assert values[f"{prefix}_calls_total", "ok", "Generate"] == values[f"{prefix}_calls_total", "ok", "Tokenize"] == 1
    assert values[f"{prefix}_calls_total", "ok", "RollBack"] == 0
    assert values[f"{prefix}_refused_versions_total", "corrupt"] == 1
    assert values[f"{prefix}_swaps_total",] == 0
    assert values[f"{prefix}_active_streams",] == values[f"{prefix}_waiting_requests",] == 0
    kinds = [values[f"{prefix}_memory_bytes", kind] for kind in ("active", "cache", "peak", "resident")]
    assert kinds == [1, 2, 3, 4]


def test_each_sample_of_a_request_has_a_first_token(metrics: InferenceMetrics, registry: CollectorRegistry) -> None:
    record = metrics.tokens_of(7, arrived=1.0)
    record(0, (1.5, 1.5, 2.0))
    record(1, (3.0,))
    record(0, (2.5,))
    values = page(registry)
    for prefix, version in (("gptloop_inference", ()), ("gptloop_inference_version", ("7",))):
        assert values[f"{prefix}_generated_tokens_total", *version] == 5
        assert values[f"{prefix}_time_to_first_token_seconds_count", *version] == 2
        assert values[f"{prefix}_time_to_first_token_seconds_sum", *version] == 2.5
        assert values[f"{prefix}_inter_token_latency_seconds_count", *version] == 3
        assert values[f"{prefix}_inter_token_latency_seconds_sum", *version] == 1.0


def test_every_series_starts_at_zero(metrics: InferenceMetrics, registry: CollectorRegistry, tmp_path: Path) -> None:
    one = publish_tiny_version(disk_registry(tmp_path), 1.0)
    metrics.resident(in_memory(one), 1)
    values = page(registry)
    prefix = "gptloop_inference"
    ends = ("eos", "length", "stop", "context_length", "cancelled", "deadline", "unavailable", "resource_exhausted")
    for end in (*ends, "invalid_argument", "internal"):
        assert values[f"{prefix}_requests_total", end] == values[f"{prefix}_version_requests_total", end, "1"] == 0
    for reason in ("corrupt", "unfit", "not_finite", "loss_mismatch", "worse", "failing", "rolled_back"):
        assert values[f"{prefix}_refused_versions_total", reason] == 0
    assert values[f"{prefix}_version_generated_tokens_total", "1"] == 0
    assert values[f"{prefix}_version_time_to_first_token_seconds_count", "1"] == 0


def test_the_time_from_commit_ends_when_the_version_serves_not_at_the_first_request(
    metrics: InferenceMetrics, registry: CollectorRegistry, tmp_path: Path
) -> None:
    one = publish_tiny_version(disk_registry(tmp_path), 1.0)
    metrics.serves(one, 0.5, swap=False, first=True)
    assert page(registry)["gptloop_inference_commit_to_serving_seconds_count",] == 1
    assert page(registry)["gptloop_inference_commit_to_first_token_seconds_count",] == 0
    for _ in range(2):
        metrics.tokens_of(1, arrived=1.0)(0, (1.25,))
    assert page(registry)["gptloop_inference_commit_to_serving_seconds_count",] == 1
    assert page(registry)["gptloop_inference_commit_to_first_token_seconds_count",] == 1


def test_the_series_of_a_removed_version_disappear(
    metrics: InferenceMetrics, registry: CollectorRegistry, tmp_path: Path
) -> None:
    one, two = (publish_tiny_version(disk_registry(tmp_path), 1.0) for _ in range(2))
    before = set(page(registry))
    metrics.resident(in_memory(one), 1)
    metrics.serves(one, 0.5, swap=False, first=True)
    for manifest in (one, two):
        metrics.resident(in_memory(one, two), manifest.version)
        metrics.streams(manifest.version, 1)
        metrics.tokens_of(manifest.version, arrived=1.0)(0, (1.25, 1.5))
        metrics.answered(manifest.version, "LENGTH")
    values = page(registry)
    prefix = "gptloop_inference_version"
    for number in ("1", "2"):
        assert values[f"{prefix}_streams", number] == values[f"{prefix}_requests_total", "length", number] == 1
        assert values[f"{prefix}_generated_tokens_total", number] == 2
        assert values[f"{prefix}_time_to_first_token_seconds_sum", number] == 0.25
        assert values[f"{prefix}_inter_token_latency_seconds_sum", number] == 0.25
    metrics.serves(two, 2.0, swap=True, first=True)
    metrics.resident(in_memory(two), 2)
    assert not any(name.startswith("gptloop_inference_version_") and "1" in labels for name, *labels in page(registry))
    metrics.resident([], None)
    assert set(page(registry)) == before
    assert page(registry)["gptloop_inference_commit_to_serving_seconds_count",] == 2
    assert page(registry)["gptloop_inference_swap_duration_seconds_sum",] == 2.0
    assert page(registry)["gptloop_inference_swaps_total",] == 1


def test_the_page_shows_how_the_serving_version_was_evaluated(
    metrics: InferenceMetrics, registry: CollectorRegistry, tmp_path: Path
) -> None:
    one, two = (publish_tiny_version(disk_registry(tmp_path), 1.0) for _ in range(2))
    digest = "0123456789abcdef"
    figures = {
        number: Figures(digest, "d", 1000, 2.0 + number, None, None, 7.0 + number, 1.0 + number, 1.0)
        for number in (1, 2)
    }

    def shown() -> dict[tuple[str, ...], float]:
        return {name: value for name, value in page(registry).items() if "_evaluated_" in name[0]}

    metrics.evaluated(figures)
    assert shown() == {}
    metrics.resident(in_memory(one, two), 2)
    assert shown() == {
        ("gptloop_inference_evaluated_bits_per_byte", digest[:12], "2"): 3.0,
        ("gptloop_inference_evaluated_perplexity", digest[:12], "2"): 9.0,
    }
    metrics.resident(in_memory(one, two), 1)
    assert set(shown().values()) == {2.0, 8.0}
    metrics.evaluated({2: figures[2]})
    assert shown() == {}


def test_a_clock_that_is_set_back_adds_no_negative_time(
    metrics: InferenceMetrics, registry: CollectorRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = publish_tiny_version(disk_registry(tmp_path), 1.0)
    monkeypatch.setattr(time, "time", lambda: version.created_at - 3600.0)
    metrics.serves(version, 0.5, swap=False, first=True)
    values = page(registry)
    assert values["gptloop_inference_commit_to_serving_seconds_count",] == 1
    assert values["gptloop_inference_commit_to_serving_seconds_sum",] == 0


def page(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_the_rate_covers_the_last_seconds_and_is_zero_when_idle() -> None:
    now = 100.0
    rate = TokenRate(lambda: now)
    for _ in range(60):
        rate.add(3)
        now += 0.05
    assert rate.read() == pytest.approx(60.0, abs=3.0)
    now += 10.0
    assert rate.read() == 0.0
