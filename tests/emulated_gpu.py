"""A GPU that is a CPU: the kernels of the CUDA decoder run in an emulation of CUDA's threads."""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shared.decoding.cuda import steps
from shared.device.cuda_driver import Bytes, Event, Graph, Kernel
from shared.device.native import build_library
from tests.workplace import PROJECT

_FOLDER = PROJECT / ".pytest_cache" / "accelerator"
_EMULATION = PROJECT / "tests/shared/decoding/cuda/emulation.h"
_PRIMITIVES = Path(steps.__file__).with_name("primitives.cuh")
# As many bytes behind each piece of memory.
_GUARD = 4096


class EmulatedGpu:
    """Does its work as late as a GPU may: when the caller waits, with what the memory of the host holds then.

    An eager one does it at once.

    A graph keeps the arguments with which it was recorded. Freed memory is overwritten with NaN, so that its use shows,
    and nothing may be written behind a piece of memory.
    """

    # Few, so that small models have products with many rows in a block, too.
    multiprocessors = 10

    def __init__(self, eager: bool = False) -> None:
        self._eager = eager
        self.launches = 0
        self._memory: dict[int, tuple[Bytes, Bytes]] = {}
        self._freed: list[Bytes] = []
        self._asked: list[Callable[[], object]] = []
        # How many pieces of work are done.
        self._done = 0
        self._recording: list[Callable[[], object]] | None = None

    @property
    def allocated_bytes(self) -> int:
        return sum(memory.nbytes for memory, _ in self._memory.values())

    def use(self) -> None:
        pass

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        primitives = _PRIMITIVES.read_text()
        assert source.startswith(primitives)
        kernels = source.removeprefix(primitives)
        # The function that enters a kernel needs its argument, which the kernels define.
        whole = f"{_EMULATION.read_text()}\n{kernels}\nENTER\n"
        options = (
            *("-std=c++17", "-O2", "-w", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"),
            f"-DEAGER={int(self._eager)}",
            *(f"-D{name}={value}" for name, value in sorted(constants.items())),
        )
        _FOLDER.mkdir(parents=True, exist_ok=True)
        self._library = ctypes.CDLL(str(build_library(whole, options, _FOLDER)))
        return lambda name: getattr(self._library, name)

    def allocate(self, size_bytes: int) -> int:
        assert self._recording is None
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
        self._ask(lambda: ctypes.memmove(address, data.ctypes.data, data.nbytes))

    def read(self, address: int, data: Bytes) -> None:
        assert data.dtype == np.uint8 and data.flags.c_contiguous
        self._ask(lambda: ctypes.memmove(data.ctypes.data, address, data.nbytes))

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        self._ask(lambda: ctypes.memmove(target, source, size_bytes))

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: ctypes.Structure) -> None:
        copied = type(argument).from_buffer_copy(argument)
        self._ask(partial(self._run, kernel, grid, threads, copied))

    def record(self, work: Callable[[], None]) -> Graph:
        assert self._recording is None
        self._recording = recorded = list[Callable[[], object]]()
        try:
            work()
        finally:
            self._recording = None
        return recorded

    def replay(self, graph: Any) -> None:
        for work in graph:
            self._ask(work)

    def event(self) -> Event:
        return [0]

    def mark(self, event: Event) -> None:
        event[0] = self._done + len(self._asked)

    def wait(self, event: Event | None = None) -> None:
        assert self._recording is None
        count = len(self._asked) if event is None else max(event[0] - self._done, 0)
        asked, self._asked = self._asked[:count], self._asked[count:]
        self._done += count
        for work in asked:
            work()
        for _, guard in self._memory.values():
            assert (guard == 0xA5).all(), "Something was written behind a piece of memory."

    def _ask(self, work: Callable[[], object]) -> None:
        if self._recording is not None:
            self._recording.append(work)
            return
        self._asked.append(work)
        if self._eager:
            self.wait()

    def _run(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: ctypes.Structure) -> None:
        self.launches += 1
        self._library.run(kernel, *grid, threads, ctypes.byref(argument))
