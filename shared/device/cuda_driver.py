"""Memory, kernels and graphs of an NVIDIA GPU, by CUDA's driver and its compiler NVRTC, which come with MLX for CUDA.

MLX builds its graph at each evaluation, and spends 10 µs or more on each kernel. A CUDA graph is built once.
"""

import ctypes
import functools
import hashlib
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.atomic_file import replacing

Bytes = NDArray[np.uint8]
Kernel = Any
Graph = Any
Event = Any

# The constants of cuda.h.
_MULTIPROCESSORS, _COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 16, 75, 76
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_CAPTURE_RELAXED = 2
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class Gpu(Protocol):
    """One GPU. Calls are asynchronous, and run in the order of the calls.

    Addresses are those of the GPU's memory. A thread calls `use` before it calls anything else.
    """

    @property
    def multiprocessors(self) -> int:
        """The number of streaming multiprocessors."""

    @property
    def allocated_bytes(self) -> int:
        """The memory that was allocated and not freed. Any thread may read it."""

    def use(self) -> None:
        """Makes the GPU's context current in this thread."""

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        """Compiles a source, unless that was done before; returns what finds its kernels by name.

        Raises `KernelsError` if that fails.
        """

    def allocate(self, size_bytes: int) -> int:
        """Returns the address of memory that holds zeros."""

    def free(self, address: int) -> None:
        """Frees memory, after the work that was asked for."""

    def host_memory(self, size_bytes: int) -> Bytes:
        """Returns memory of the host from which and to which the GPU copies while the caller goes on."""

    def write(self, address: int, data: Bytes) -> None:
        """Copies from memory of the host, which must keep its content until the copy is done."""

    def read(self, address: int, data: Bytes) -> None:
        """Copies to memory of the host; waits only if that is not `host_memory`."""

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """Copies within the GPU's memory."""

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: ctypes.Structure) -> None:
        """Starts a kernel, which gets a copy of the argument.

        It may begin while a kernel before it still runs, whose end it waits for itself (CUDA's programming guide,
        "Programmatic Dependent Launch").
        """

    def record(self, work: Callable[[], None]) -> Graph:
        """Returns the copies and launches of some work, which are not done now, as a graph."""

    def replay(self, graph: Graph) -> None:
        """Does the work of a graph."""

    def event(self) -> Event:
        """Returns an event to `mark`."""

    def mark(self, event: Event) -> None:
        """Makes an event happen when all work that was asked for so far is done."""

    def wait(self, event: Event | None = None) -> None:
        """Waits for all work, or for the work before the last `mark` of an event; an event without a mark has happened.

        Raises `CudaError` if a kernel failed.
        """


class CudaError(RuntimeError):
    """An error of CUDA's driver or compiler."""


class KernelsError(CudaError):
    """Kernels cannot be compiled for this GPU, or loaded."""


class _LaunchAttribute(ctypes.Structure):
    """`CUlaunchAttribute` of cuda.h: an id and one of several values."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15)]


class _Launch(ctypes.Structure):
    """`CUlaunchConfig` of cuda.h."""

    _fields_ = [
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class CudaDriver:
    """The first NVIDIA GPU that this process may use, in the context of MLX, with a stream of work of its own.

    Memory, graphs and modules are freed with it.
    """

    def __init__(self, cache: Path) -> None:
        """Compiled kernels are kept in the folder `cache`. Raises `CudaError` if there is no GPU."""
        self._cache = cache
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"CUDA's driver cannot be loaded: {error}.") from None
        self._call("cuInit", 0)
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        self.use()
        self._call("cuStreamCreate", ctypes.byref(stream), _STREAM_NON_BLOCKING)
        self._stream = stream
        # Of what is allocated, by address.
        self._sizes: dict[int, int] = {}
        # What is to be given back, by the function that does it.
        self._held: dict[str, list[Any]] = {
            "cuMemFree_v2": [],
            "cuMemFreeHost": [],
            "cuGraphExecDestroy": [],
            "cuEventDestroy_v2": [],
            "cuModuleUnload": [],
            "cuStreamDestroy_v2": [stream],
        }
        weakref.finalize(self, _release, self._cuda, context, self._held).atexit = False
        major, minor = (
            self._attribute(which, device) for which in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
        )
        self.capability = (major, minor)
        self.multiprocessors = self._attribute(_MULTIPROCESSORS, device)
        self._early = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._starts_early = int(self.capability >= (9, 0))

    @property
    def allocated_bytes(self) -> int:
        """As in `Gpu`."""
        return sum(list(self._sizes.values()))

    def use(self) -> None:
        """As in `Gpu`."""
        self._call("cuCtxSetCurrent", self._context)

    def load(self, source: str, constants: dict[str, str]) -> Callable[[str], Kernel]:
        """As in `Gpu`."""
        major, minor = self.capability
        # A multiplication and an addition must not become one operation in one kernel and two in another.
        options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17", "--fmad=false"]
        options += [f"--define-macro={name}={value}" for name, value in sorted(constants.items())]
        compiler = _Nvrtc()
        digest = hashlib.sha256("\n".join([compiler.version(), *options, source]).encode()).hexdigest()[:20]
        path = self._cache / f"cuda-{digest}.cubin"
        if path.exists():
            binary = path.read_bytes()
        else:
            binary = compiler.compile(source, options)
            with replacing(path) as file:
                file.write(binary)
        module = ctypes.c_void_p()
        try:
            self._call("cuModuleLoadData", ctypes.byref(module), binary)
        except CudaError as error:
            raise KernelsError(str(error)) from None
        self._held["cuModuleUnload"].append(module)

        @functools.cache
        def kernel(name: str) -> Kernel:
            function = ctypes.c_void_p()
            self._call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
            return function

        return kernel

    def allocate(self, size_bytes: int) -> int:
        """As in `Gpu`."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self._sizes[address.value] = size_bytes
        self._held["cuMemFree_v2"].append(address.value)
        self._call("cuMemsetD8Async", address, ctypes.c_ubyte(0), ctypes.c_size_t(size_bytes), self._stream)
        return address.value

    def free(self, address: int) -> None:
        """As in `Gpu`."""
        self.wait()
        self._held["cuMemFree_v2"].remove(address)
        del self._sizes[address]
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def host_memory(self, size_bytes: int) -> Bytes:
        """As in `Gpu`."""
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(size_bytes), 0)
        assert address.value is not None
        self._held["cuMemFreeHost"].append(address)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address.value))

    def write(self, address: int, data: Bytes) -> None:
        """As in `Gpu`."""
        size = ctypes.c_size_t(data.nbytes)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), data.ctypes.data_as(ctypes.c_void_p), size, self._stream
        )

    def read(self, address: int, data: Bytes) -> None:
        """As in `Gpu`."""
        size = ctypes.c_size_t(data.nbytes)
        self._call(
            "cuMemcpyDtoHAsync_v2", data.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), size, self._stream
        )

    def copy(self, target: int, source: int, size_bytes: int) -> None:
        """As in `Gpu`."""
        addresses = (ctypes.c_uint64(target), ctypes.c_uint64(source))
        self._call("cuMemcpyDtoDAsync_v2", *addresses, ctypes.c_size_t(size_bytes), self._stream)

    def launch(self, kernel: Kernel, grid: tuple[int, int], threads: int, argument: ctypes.Structure) -> None:
        """As in `Gpu`."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        launch = _Launch(*grid, 1, threads, 1, 1, 0, self._stream, ctypes.pointer(self._early), self._starts_early)
        self._call("cuLaunchKernelEx", ctypes.byref(launch), kernel, arguments, None)

    def record(self, work: Callable[[], None]) -> Graph:
        """As in `Gpu`."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, _CAPTURE_RELAXED)
        try:
            work()
        except BaseException:
            self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            self._cuda.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cuGraphDestroy", graph)
        self._held["cuGraphExecDestroy"].append(executable)
        return executable

    def replay(self, graph: Graph) -> None:
        """As in `Gpu`."""
        self._call("cuGraphLaunch", graph, self._stream)

    def event(self) -> Event:
        """As in `Gpu`."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), _EVENT_DISABLE_TIMING)
        self._held["cuEventDestroy_v2"].append(event)
        return event

    def mark(self, event: Event) -> None:
        """As in `Gpu`."""
        self._call("cuEventRecord", event, self._stream)

    def wait(self, event: Event | None = None) -> None:
        """As in `Gpu`."""
        if event is None:
            self._call("cuStreamSynchronize", self._stream)
        else:
            self._call("cuEventSynchronize", event)

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name} failed with {code}: {(text.value or b'unknown error').decode()}.")


def _release(cuda: ctypes.CDLL, context: ctypes.c_void_p, held: dict[str, list[Any]]) -> None:
    """Gives back what a `CudaDriver` held, when its work is done."""
    cuda.cuCtxSetCurrent(context)
    cuda.cuStreamSynchronize(held["cuStreamDestroy_v2"][0])
    for name, handles in held.items():
        for handle in handles:
            getattr(cuda, name)(ctypes.c_uint64(handle) if isinstance(handle, int) else handle)


class _Nvrtc:
    """CUDA's compiler, as MLX has loaded it."""

    def __init__(self) -> None:
        for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
            try:
                self._library = ctypes.CDLL(name)
                return
            except OSError:
                continue
        raise KernelsError("The compiler NVRTC cannot be loaded; it comes with MLX for CUDA.")

    def version(self) -> str:
        """Returns its version as two numbers."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, options: Sequence[str]) -> bytes:
        """Returns the machine code of a source; raises `KernelsError` with the compiler's report."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self._call("nvrtcCompileProgram", program, len(options), given)
            return self._read("nvrtcGetCUBIN", program)
        except CudaError:
            report = self._read("nvrtcGetProgramLog", program).decode(errors="replace")
            raise KernelsError(f"NVRTC cannot compile the kernels: {report}") from None
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, name: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{name}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(name, program, text)
        return text.raw

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise CudaError(f"{name} failed with {code}.")
