import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MACHINE = Path(__file__).parents[2] / "requirements" / "machine.py"


@pytest.fixture
def machine() -> Any:
    """The module, on a machine that meets every requirement; tests remove one."""
    spec = importlib.util.spec_from_file_location("machine", MACHINE)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.sys = SimpleNamespace(version_info=(3, 14, 0))
    module.shutil = SimpleNamespace(which=lambda name: f"/usr/bin/{name}")
    set_platform(module)
    return module


def set_platform(
    machine: Any, architecture: str = "x86_64", libc: tuple[str, str] = ("glibc", "2.35"), macos: str = "14.5"
) -> None:
    machine.platform = SimpleNamespace(
        machine=lambda: architecture, libc_ver=lambda: libc, mac_ver=lambda: (macos, ("", "", ""), architecture)
    )


@pytest.mark.parametrize("architecture", ["x86_64", "aarch64"])
@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_every_python_with_mlx_wheels_is_accepted(machine: Any, minor: int, architecture: str) -> None:
    machine.sys.version_info = (3, minor, 1)
    set_platform(machine, architecture)
    assert machine.lacks("cpu") == ""


def test_macos_needs_apple_silicon_and_version_14(machine: Any) -> None:
    set_platform(machine, "arm64", libc=("", ""))
    assert machine.lacks("macos") == ""
    set_platform(machine, "arm64", libc=("", ""), macos="13.6")
    assert "macOS 14" in machine.lacks("macos")
    set_platform(machine, "x86_64", libc=("", ""))
    assert "Apple silicon" in machine.lacks("macos")


@pytest.mark.parametrize("version", [(3, 10, 9), (3, 15, 0), (3, 6, 8)])
def test_another_python_is_rejected_by_its_version(machine: Any, version: tuple[int, int, int]) -> None:
    machine.sys.version_info = version
    sentence = machine.lacks("cpu")
    assert (
        f"Python 3.11 to 3.14, because MLX has wheels for these, but this is Python {version[0]}.{version[1]}"
        in sentence
    )


@pytest.mark.parametrize("libc", [("glibc", "2.31"), ("glibc", "2.9"), ("", "")])
def test_an_old_or_unknown_c_library_is_rejected(machine: Any, libc: tuple[str, str]) -> None:
    set_platform(machine, libc=libc)
    assert "MLX needs glibc 2.35 or newer" in machine.lacks("cpu")


def test_an_unsupported_architecture_is_rejected(machine: Any) -> None:
    set_platform(machine, "riscv64")
    assert "riscv64" in machine.lacks("cpu")


def test_only_a_cpu_needs_a_compiler(machine: Any) -> None:
    machine.shutil.which = lambda name: None
    assert "apt-get install g++" in machine.lacks("cpu")
    assert machine.lacks("cuda") == ""


def test_a_folder_with_a_colon_is_rejected(machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a:b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "colon" in machine.lacks("cpu")
