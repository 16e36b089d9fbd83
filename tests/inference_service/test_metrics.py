import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from inference_service.metrics import InferenceMetrics, TokenRate
from shared.accelerator import Memory


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> InferenceMetrics:
    return InferenceMetrics(registry, lambda: Memory(1, 2, 3, 4))


def test_the_page_shows_what_was_counted(metrics: InferenceMetrics, registry: CollectorRegistry) -> None:
    metrics.accepted(7)
    metrics.token(arrived=1.0, last_at=None, at=1.25)
    metrics.token(arrived=1.0, last_at=1.25, at=1.5)
    metrics.ended("LENGTH")
    metrics.refused("corrupt")
    families = text_string_to_metric_families(generate_latest(registry).decode())
    values = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    prefix = "gptloop_inference"
    assert values[f"{prefix}_generated_tokens_total",] == 2
    assert values[f"{prefix}_prompt_tokens_total",] == 7
    assert values[f"{prefix}_tokens_per_second",] > 0
    assert values[f"{prefix}_time_to_first_token_seconds_sum",] == 0.25
    assert values[f"{prefix}_inter_token_latency_seconds_count",] == 1
    assert values[f"{prefix}_requests_total", "length"] == 1
    assert values[f"{prefix}_refused_versions_total", "corrupt"] == 1
    assert values[f"{prefix}_swaps_total",] == 0
    assert values[f"{prefix}_active_streams",] == values[f"{prefix}_waiting_requests",] == 0
    kinds = [values[f"{prefix}_memory_bytes", kind] for kind in ("active", "cache", "peak", "resident")]
    assert kinds == [1, 2, 3, 4]


def test_the_rate_is_that_of_the_last_seconds_and_zero_when_idle() -> None:
    now = 100.0
    rate = TokenRate(lambda: now)
    for _ in range(60):
        rate.add()
        now += 0.05
    assert rate.read() == pytest.approx(20.0, abs=1.0)
    now += 10.0
    assert rate.read() == 0.0
