import configparser
import re
from pathlib import Path

import pytest

from deploy.services.installation import PROCESSES, read_installation
from shared.errors import InvalidArgument
from tests.workplace import PROJECT


def test_the_settings_of_the_call_are_kept_and_nothing_else(tmp_path: Path) -> None:
    installation = read_installation(
        {"GPTLOOP_VAR": str(tmp_path), "GPTLOOP_INFERENCE_SLOTS": "16", "PATH": "/opt/bin", "EDITOR": "vi", "LANG": "C"}
    )
    assert installation.environment == {
        "GPTLOOP_VAR": str(tmp_path),
        "GPTLOOP_INFERENCE_SLOTS": "16",
        "PATH": "/opt/bin",
    }
    assert [process.name for process in installation.processes] == ["redis", "trainer", "inference", "worker"]


def test_an_external_redis_gets_no_service(tmp_path: Path) -> None:
    installation = read_installation({"GPTLOOP_VAR": str(tmp_path), "REDIS_URL": "redis://localhost:6379"})
    assert [process.name for process in installation.processes] == ["trainer", "inference", "worker"]


def test_a_relative_path_is_one_of_the_folder_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installation = read_installation({"GPTLOOP_GROQ_KEY_FILE": "secrets/groq", "GPTLOOP_VAR": "state"})
    assert installation.environment["GPTLOOP_GROQ_KEY_FILE"] == str(tmp_path / "secrets/groq")
    assert installation.environment["GPTLOOP_VAR"] == str(tmp_path / "state")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("GROQ_API_KEY", "gsk_planted", "set GPTLOOP_GROQ_KEY_FILE to a file"),
        ("REDIS_URL", "redis://:planted@localhost", "set GPTLOOP_REDIS_PASSWORD_FILE to a file"),
        ("REDIS_URL", "redis://localhost?password=planted", "set GPTLOOP_REDIS_PASSWORD_FILE to a file"),
        ("GPTLOOP_INFERENCE_SLOTS", "many", "GPTLOOP_INFERENCE_SLOTS is 'many'"),
        ("GPTLOOP_TRAINER_STUCK_S", "0", "GPTLOOP_TRAINER_STUCK_S is 0"),
        ("GPTLOOP_INFERENCE_PORT", "50052", "are the same port"),
        ("GPTLOOP_GROQ_KEY_FILE", "a\nb", "cannot hold control characters"),
        ("PATH", "/a\x1b", "cannot hold control characters"),
    ],
)
def test_what_a_service_cannot_have_is_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(sentence)) as caught:
        read_installation({"GPTLOOP_VAR": str(tmp_path), name: text})
    assert "planted" not in str(caught.value)


def test_a_service_gets_as_long_to_stop_as_under_supervisord() -> None:
    configuration = configparser.RawConfigParser()
    configuration.read(PROJECT / "deploy/supervisord.conf")
    # `gptloop up` gives the worker 60 s.
    stops = {
        process.name: configuration[f"program:{process.name}"]["stopwaitsecs"].replace(
            "%(ENV_GPTLOOP_WORKER_STOP_S)s", "60"
        )
        for process in PROCESSES
    }
    assert stops == {process.name: str(process.stop_s) for process in PROCESSES}
    for process in PROCESSES:
        assert " ".join(process.words) in configuration[f"program:{process.name}"]["command"]
