import pytest

from inference_service.settings import read_settings
from shared.errors import InvalidArgument


def test_an_empty_environment_gives_the_defaults() -> None:
    settings = read_settings({})
    assert (settings.host, settings.port, settings.metrics_port, settings.slots) == ("127.0.0.1", 50051, 9101, 8)
    assert settings.directories.var.name == "var"


def test_every_setting_is_read_from_its_variable() -> None:
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
        }
    )
    assert str(settings.directories.var) == "/elsewhere"
    assert (settings.host, settings.port, settings.metrics_port, settings.slots) == ("::1", 0, 1, 2)
    assert (settings.max_waiting_requests, settings.max_waiting_prompt_tokens) == (3, 4)
    assert (settings.poll_interval_s, settings.resident_versions) == (0.5, 6)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GPTLOOP_INFERENCE_PORT", "70000"),
        ("GPTLOOP_INFERENCE_SLOTS", "1"),
        ("GPTLOOP_INFERENCE_POLL_INTERVAL_S", "often"),
        ("GPTLOOP_INFERENCE_RESIDENT_VERSIONS", "1"),
    ],
)
def test_a_bad_value_is_refused_with_the_variable(variable: str, value: str) -> None:
    with pytest.raises(InvalidArgument, match=variable):
        read_settings({variable: value})
