import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import inference_service.measure
from inference_service.engine.request import NotFinite
from inference_service.measure import Measurement, measure
from inference_service.settings import Settings
from shared.decoding.weight_format import WeightFormat
from shared.device.accelerator import Accelerator
from shared.errors import CorruptCheckpoint, FailedPrecondition
from shared.gpt.config import count_parameters
from shared.gpt.weights import load_arrays, save_arrays
from shared.service.settings import read_directories
from tests.decoders import COMPILED
from tests.fakes import TINY, publish_tiny_version
from tests.registries import disk_registry, version_folder
from tests.workplace import PROJECT

HERE = Accelerator("A processor", "cpu", "", 1 << 30, COMPILED)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference_service.measure, "_LEAST_S", 0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(read_directories({"GPTLOOP_VAR": str(tmp_path)}))


def publish(
    folder: Path, context_length: int = TINY.context_length, change: Callable[[Path], None] | None = None
) -> Path:
    registry = disk_registry(folder / "registry")
    config = replace(TINY, context_length=context_length)
    windows = (1, min(40, context_length))
    return version_folder(
        registry, publish_tiny_version(registry, 1.0, config=config, windows=windows, change=change).version
    )


def measured(folder: Path, settings: Settings, *rows: int, lines: list[str] | None = None) -> Measurement:
    return measure(folder, rows, settings, HERE, ([] if lines is None else lines).append)


def test_every_number_of_requests_is_measured(tmp_path: Path, settings: Settings) -> None:
    lines: list[str] = []
    found = measured(publish(tmp_path), settings, 1, 3, lines=lines)
    assert [each.rows for each in found.decoding] == [1, 3]
    for each in found.decoding:
        assert each.tokens_per_s > 0
        for times in (each.first_token_ms, each.inter_token_ms):
            assert 0 < times.p50 <= times.p90 <= times.p99
    assert found.prefill_tokens_per_s > 0
    assert [line.partition(":")[0] for line in lines] == [
        "reading a prompt",
        "1 requests at once",
        "3 requests at once",
    ]
    assert (found.device, found.threads, found.slots) == ("A processor", 1, 3)


def test_memory_is_that_of_the_weights_and_of_a_slot_for_each_request(tmp_path: Path, settings: Settings) -> None:
    version = publish(tmp_path)
    few, many = (measured(version, settings, rows) for rows in (1, 5))
    assert few.weights_bytes == many.weights_bytes == 4 * count_parameters(TINY).total
    # A key and a value of the model's width in each layer, in bf16.
    assert few.cache_bytes_per_token == 2 * 2 * TINY.layers * TINY.width
    assert few.slots == 2
    assert many.memory_bytes - few.memory_bytes == 3 * TINY.context_length * few.cache_bytes_per_token
    assert few.resident_bytes > few.memory_bytes > count_parameters(TINY).total
    plain = measured(version, replace(settings, weights=WeightFormat.FP32), 1)
    assert plain.cache_bytes_per_token == 2 * few.cache_bytes_per_token
    assert plain.memory_bytes > plain.weights_bytes


def test_the_shortest_context_that_has_a_time_between_tokens_is_measured(tmp_path: Path, settings: Settings) -> None:
    assert measured(publish(tmp_path / "3", 3), settings, 2).decoding[0].inter_token_ms.p50 > 0
    with pytest.raises(FailedPrecondition, match="whose context has 2 tokens cannot be measured: it needs at least 3"):
        measured(publish(tmp_path / "2", 2), settings, 2)


def test_a_request_that_fails_ends_the_measurement(tmp_path: Path, settings: Settings) -> None:
    def overflow(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_arrays(path)
        # Their product is infinite.
        large = {name: 1e30 * weights[name] for name in ("final_norm.weight", "head.weight")}
        save_arrays(weights | large, path)

    with pytest.raises(NotFinite):
        measured(publish(tmp_path, change=overflow), settings, 2)


def test_a_folder_without_a_version_is_reported(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json cannot be read: No such file or directory"):
        measured(tmp_path, settings, 1)


@pytest.mark.slow
def test_the_last_line_of_the_command_is_json(tmp_path: Path) -> None:
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "inference_service", "measure", str(folder), "--rows", "2"]
        # Kept from one run of the tests to the next, with what was compiled.
        environment = {"GPTLOOP_VAR": str(COMPILED), "GPTLOOP_INFERENCE_THREADS": "1", "PATH": "/usr/bin:/bin"}
        return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)

    ended = run(publish(tmp_path))
    assert ended.returncode == 0, ended.stderr
    *parts, last = ended.stdout.splitlines()
    assert len(parts) == 2
    assert [each["rows"] for each in json.loads(last)["decoding"]] == [2]
    ended = run(tmp_path / "none")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: {tmp_path / 'none'}/manifest.json cannot be read: No such file or directory.\n"
