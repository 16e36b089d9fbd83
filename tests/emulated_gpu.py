"""A GPU that is a CPU: the kernels of the CUDA decoder run in an emulation of CUDA's threads."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shared.decoding.cuda import steps
from shared.device.cuda_driver import Bytes, Graph, Kernel
from shared.device.native import build_library
from tests.workplace import PROJECT

_FOLDER = PROJECT / ".pytest_cache" / "accelerator"
_EMULATION = PROJECT / "tests/shared/decoding/cuda/emulation.h"
# As many bytes behind each piece of memory.
_GUARD = 4096
_PRIMITIVES = Path(steps.__file__).with_name("primitives.cuh")


class EmulatedGpu:
    """Does all work at once. Freed memory is overwritten with NaN, so that its use shows, and nothing may be written
    behind a piece of memory."""

    def __init__(self) -> None:
        self.launches = 0
        self._memory: dict[int, tuple[Bytes, Bytes]] = {}
        self._freed: list[Bytes] = []

    def use(self) -> None:
        pass

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        primitives = _PRIMITIVES.read_text()
        assert source.startswith(primitives)
        kernels = source.removeprefix(primitives)
        # The function that enters a kernel needs its argument, which the kernels define.
        whole = f"{_EMULATION.read_text()}\n{kernels}\nENTER\n"
        options = (
            "-std=c++17",
            "-O2",
            "-w",
            "-fvisibility=hidden",
            "-U_FORTIFY_SOURCE",
            *(f"-D{name}={value}" for name, value in sorted(constants.items())),
        )
        _FOLDER.mkdir(parents=True, exist_ok=True)
        self._library = ctypes.CDLL(str(build_library(whole, "c++", options, _FOLDER)))
        return lambda name: getattr(self._library, name)

    def allocate(self, size_bytes: int) -> int:
        memory = np.zeros(size_bytes + 15 + _GUARD, np.uint8)
        address = -(-memory.ctypes.data // 16) * 16
        end = address - memory.ctypes.data + size_bytes
        memory[end:] = 0xA5
        self._memory[address] = memory[:end], memory[end:]
        return address

    def free(self, address: int) -> None:
        self.wait()
        memory, _ = self._memory.pop(address)
        memory[:] = 0xFF
        self._freed.append(memory)

    def host_memory(self, size_bytes: int) -> Bytes:
        return np.zeros(size_bytes, np.uint8)

    def write(self, address: int, data: Bytes) -> None:
        assert data.dtype == np.uint8 and data.flags.c_contiguous
        ctypes.memmove(address, data.ctypes.data, data.nbytes)

    def read(self, address: int, data: Bytes) -> None:
        assert data.dtype == np.uint8 and data.flags.c_contiguous
        ctypes.memmove(data.ctypes.data, address, data.nbytes)

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        ctypes.memmove(target, source, size_bytes)

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: ctypes.Structure) -> None:
        self.launches += 1
        self._library.run(kernel, *grid, threads, ctypes.byref(argument))

    def record(self, work: Callable[[], None]) -> Graph:
        return work

    def replay(self, graph: Any) -> None:
        graph()

    def wait(self) -> None:
        for _, guard in self._memory.values():
            assert (guard == 0xA5).all(), "Something was written behind a piece of memory."
