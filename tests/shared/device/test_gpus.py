from pathlib import Path

import pytest

from shared.device.gpus import gpu_memories_bytes
from tests.nvidia import nvidia_machine


@pytest.fixture
def _machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = nvidia_machine(tmp_path, [81559, 81559, 40000])
    monkeypatch.setenv("PATH", machine["PATH"])
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize(
    ("shown", "mebibytes"),
    [
        (None, [81559, 81559, 40000]),
        ("2,0", [40000, 81559]),
        ("GPU-2222", [40000]),
        # As CUDA does, what follows an unknown name is not shown.
        ("0,7,1", [81559]),
        ("", []),
        ("-1", []),
        # Several match.
        ("GPU-", []),
    ],
)
def test_each_gpu_that_cuda_shows_is_found_with_its_memory(
    shown: str | None, mebibytes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert gpu_memories_bytes() == tuple(size << 20 for size in mebibytes)


@pytest.mark.usefixtures("_machine")
@pytest.mark.parametrize("answer", ["echo No devices were found", "exit 9"])
def test_a_driver_without_a_gpu_is_no_gpu(answer: str, tmp_path: Path) -> None:
    (tmp_path / "programs" / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
    assert gpu_memories_bytes() == ()


def test_a_gpu_counts_only_if_mlx_is_installed_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", nvidia_machine(tmp_path, [81559])["PATH"])
    assert gpu_memories_bytes() == ()
