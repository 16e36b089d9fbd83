import pytest

from inference_service.settings import read_settings, weights_on
from shared.decoding.weight_format import DEFAULT_WEIGHTS, WeightFormat
from shared.errors import InvalidArgument
from shared.registry.decisions import BestBy


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port, settings.metrics_port, settings.slots) == ("127.0.0.1", 50051, 9101, 8)
    assert settings.directories.var.name == "var"
    assert (settings.gate_margin, settings.best_by) == (0.05, BestBy.TRAINING)
    assert (settings.client_streams, settings.client_tokens_per_minute) == (0, 0)
    assert settings.missing_tokens == ("GPTLOOP_CLIENT_TOKENS", "GPTLOOP_OPERATOR_TOKENS")


def test_every_setting_has_its_variable() -> None:
    settings = read_settings(
        {
            "GPTLOOP_VAR": "/elsewhere",
            "GPTLOOP_INFERENCE_HOST": "::1",
            "GPTLOOP_INFERENCE_PORT": "0",
            "GPTLOOP_INFERENCE_METRICS_PORT": "1",
            "GPTLOOP_INFERENCE_SLOTS": "2",
            "GPTLOOP_INFERENCE_MAX_WAITING_REQUESTS": "3",
            "GPTLOOP_INFERENCE_MAX_WAITING_PROMPT_TOKENS": "4",
            "GPTLOOP_INFERENCE_POLL_INTERVAL_S": "0.5",
            "GPTLOOP_INFERENCE_RESIDENT_VERSIONS": "6",
            "GPTLOOP_INFERENCE_GATE_MARGIN": "0.25",
            "GPTLOOP_INFERENCE_THREADS": "7",
            "GPTLOOP_INFERENCE_PREFILL_TOKENS": "128",
            "GPTLOOP_INFERENCE_WEIGHTS": "bf16",
            "GPTLOOP_INFERENCE_PREFIX_CACHE_MIB": "0",
            "GPTLOOP_INFERENCE_SLOW_READER_S": "1.5",
            "GPTLOOP_INFERENCE_STUCK_AFTER_S": "2.5",
            "GPTLOOP_INFERENCE_DRAIN_S": "0",
            "GPTLOOP_CLIENT_TOKENS": "/clients",
            "GPTLOOP_INFERENCE_CLIENT_STREAMS": "8",
            "GPTLOOP_INFERENCE_CLIENT_TOKENS_PER_MINUTE": "9",
            "GPTLOOP_BEST_BY": "evaluation",
        }
    )
    assert str(settings.directories.var) == "/elsewhere"
    assert (settings.host, settings.port, settings.metrics_port, settings.slots) == ("::1", 0, 1, 2)
    assert (settings.max_waiting_requests, settings.max_waiting_prompt_tokens) == (3, 4)
    assert (settings.poll_interval_s, settings.resident_versions) == (0.5, 6)
    assert (settings.threads, settings.prefill_tokens, settings.prefix_cache_mib) == (7, 128, 0)
    assert (settings.slow_reader_s, settings.stuck_after_s, settings.drain_s) == (1.5, 2.5, 0.0)
    assert settings.gate_margin == 0.25
    assert settings.weights is WeightFormat.BF16
    assert settings.missing_tokens == ("GPTLOOP_OPERATOR_TOKENS",)
    assert (settings.client_streams, settings.client_tokens_per_minute) == (8, 9)
    assert settings.best_by is BestBy.EVALUATION


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GPTLOOP_INFERENCE_PORT", "70000"),
        ("GPTLOOP_INFERENCE_SLOTS", "1"),
        ("GPTLOOP_INFERENCE_POLL_INTERVAL_S", "often"),
        ("GPTLOOP_INFERENCE_RESIDENT_VERSIONS", "1"),
        ("GPTLOOP_INFERENCE_GATE_MARGIN", "-0.1"),
        ("GPTLOOP_INFERENCE_GATE_MARGIN", "nan"),
        ("GPTLOOP_INFERENCE_WEIGHTS", "int4"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=variable):
        read_settings({variable: value})


def test_weights_have_a_format_on_a_cpu_only() -> None:
    assert read_settings({}).weights is None
    assert weights_on("cpu", None) is DEFAULT_WEIGHTS
    assert weights_on("cpu", WeightFormat.FP32) is WeightFormat.FP32
    assert weights_on("cuda", None) is None
    with pytest.raises(InvalidArgument, match="GPTLOOP_INFERENCE_WEIGHTS is int8, but this server computes on a GPU"):
        weights_on("metal", WeightFormat.INT8)


@pytest.mark.parametrize("name", ["http://models.example", "models.example:8080", "models.example/", "[::1]", "mödels"])
def test_a_host_that_no_request_would_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match=r"GPTLOOP_INFERENCE_HTTP_HOSTS has .* a name without scheme and port"):
        read_settings({"GPTLOOP_INFERENCE_HTTP_HOSTS": f"models.example {name}"})


@pytest.mark.parametrize(
    "origin",
    ["https://example.org/", "https://example.org/page", "example.org", "https://Example.org", "*", "null", "https://"],
)
def test_an_origin_that_no_browser_would_send_is_refused(origin: str) -> None:
    with pytest.raises(InvalidArgument, match=r"GPTLOOP_INFERENCE_HTTP_ORIGINS has .* without a path, such as"):
        read_settings({"GPTLOOP_INFERENCE_HTTP_ORIGINS": f"https://example.org {origin}"})


def test_names_are_read_with_spaces_between_them() -> None:
    origins = "https://example.org http://localhost:3000 http://[::1]:80 chrome-extension://abc"
    settings = read_settings(
        {"GPTLOOP_INFERENCE_HTTP_HOSTS": " a.example  Models_2 ", "GPTLOOP_INFERENCE_HTTP_ORIGINS": origins}
    )
    assert settings.http_hosts == ("a.example", "Models_2")
    assert settings.http_origins == tuple(origins.split())


@pytest.mark.parametrize("name", ["CLIENT_STREAMS", "CLIENT_TOKENS_PER_MINUTE"])
def test_a_limit_of_clients_needs_their_names(name: str) -> None:
    variable = f"GPTLOOP_INFERENCE_{name}"
    with pytest.raises(InvalidArgument, match=f"{variable} is 5, but limits only .*; set GPTLOOP_CLIENT_TOKENS too"):
        read_settings({variable: "5"})
    read_settings({variable: "5", "GPTLOOP_CLIENT_TOKENS": "/clients"})
    read_settings({variable: "0"})
