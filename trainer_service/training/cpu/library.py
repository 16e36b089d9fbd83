"""The library that trains on a CPU: its structures and functions, and how it is built.

Shapes: B rows, T tokens, N = B x T.
"""

import ctypes
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shared.device import accelerator
from shared.device.native import VECTOR_OPTIONS, VECTORS, build_library, joined, prebuild_library
from shared.errors import FailedPrecondition

if TYPE_CHECKING:
    # It brings MLX in, which building the library does not need.
    from trainer_service.training.cpu.model import CpuModel

# In the order in which they are joined.
_FILES = ("matrices.h", "rows.h", "attention.h", "loss.h", "optimizer.h", "step.cpp")
_CACHE_LINE = 64

Pointer = ctypes.c_void_p
Floats = NDArray[np.float32]


class Pair(ctypes.Structure):
    """A LayerNorm or a linear layer."""

    _fields_ = [("weight", Pointer), ("bias", Pointer)]


class Layer(ctypes.Structure):
    """A block of the model."""

    _fields_ = [(name, Pair) for name in ("attention_norm", "qkv", "output", "feed_forward_norm", "up", "down")]


class Shape(ctypes.Structure):
    """What a model's configuration says."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("layers", "width", "hidden", "heads", "vocabulary")),
        ("epsilon", ctypes.c_float),
    ]


class Arrays(ctypes.Structure):
    """The weights of a model, or their gradients."""

    _fields_ = [
        *(("tokens", Pointer), ("positions", Pointer), ("norm", Pair), ("head", Pointer)),
        ("layer", ctypes.POINTER(Layer)),
    ]


class Model(ctypes.Structure):
    """A model."""

    _fields_ = [("shape", Shape), ("arrays", Arrays)]


class Dropout(ctypes.Structure):
    """Which numbers are dropped: two random numbers below 2^24, the least hash of a kept one, and the factor of
    those."""

    _fields_ = [(name, ctypes.c_uint32) for name in ("first", "second", "least")] + [("scale", ctypes.c_float)]


Dropouts = ctypes.Array[Dropout]


class _Inputs(ctypes.Structure):
    _fields_ = [
        *(("B", ctypes.c_int), ("T", ctypes.c_int)),
        *((name, Pointer) for name in ("tokens", "kept", "dropouts")),
    ]


class _Teaching(ctypes.Structure):
    _fields_ = [("teachers", ctypes.c_int), ("alpha", ctypes.c_float), ("temperature", ctypes.c_float)]


class _Task(ctypes.Structure):
    _fields_ = [
        *(("inputs", _Inputs), ("targets", Pointer), ("shares", Pointer)),
        *(("teaching", _Teaching), ("teachers", ctypes.POINTER(Model))),
    ]


class Update(ctypes.Structure):
    """What an update needs beside the arrays: the factor that clips gradients, the rate, and the factor by which decay
    scales a weight."""

    _fields_ = [(name, ctypes.c_float) for name in ("clip", "rate", "decay")]


class AdamW(ctypes.Structure):
    """The values of AdamW, with the corrections of a step."""

    _fields_ = [(name, ctypes.c_float) for name in ("beta1", "beta2", "correction1", "correction2", "epsilon")]


_Polynomial = ctypes.c_float * 3


class Muon(ctypes.Structure):
    """The values of Muon, with polynomials of three coefficients each."""

    _fields_ = [
        *(("momentum", ctypes.c_float), ("size", ctypes.c_float)),
        *(("polynomials", ctypes.c_int), ("polynomial", ctypes.POINTER(_Polynomial))),
    ]

    def __init__(self, momentum: float, size: float, polynomials: Sequence[tuple[float, float, float]]) -> None:
        super().__init__(
            momentum,
            size,
            len(polynomials),
            (_Polynomial * len(polynomials))(*(_Polynomial(*each) for each in polynomials)),
        )


class Scratch:
    """Memory that is kept between calls. One thread at a time may use it."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._bytes.size

    def reserve(self, numbers: int) -> int:
        """Returns the address of at least this many numbers in fp32, at a cache line."""
        size = 4 * numbers + _CACHE_LINE
        if self._bytes.size < size:
            self._bytes = np.empty(size, np.uint8)
        return self._bytes.ctypes.data + -self._bytes.ctypes.data % _CACHE_LINE


class ThreadScratch(threading.local):
    """Memory of each thread."""

    def __init__(self) -> None:
        self.scratch = Scratch()


@dataclass(frozen=True)
class Task:
    """What a pass reads: inputs and targets (B, T), each target's share (B, T) of the sum of their losses, and which
    inputs (B, T) the student is shown: all if `kept` is None.

    `dropouts` are those of the embeddings and, in each layer, of values, attention and feed-forward; None drops
    nothing. The teachers are those of a `Distillation`.
    """

    inputs: NDArray[np.int32]
    targets: NDArray[np.int32]
    shares: Floats
    kept: Floats | None = None
    dropouts: "Dropouts | None" = None
    teachers: Sequence["CpuModel"] = ()
    alpha: float = 0.0
    temperature: float = 1.0


class TrainingLibrary:
    """The functions of `step.cpp`. Each computes on one core, and several threads may call them."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        model, task, inputs, update = map(ctypes.POINTER, (Model, _Task, _Inputs, Update))
        for name, result, arguments in (
            ("gradients_size", ctypes.c_size_t, [model, task]),
            ("losses_size", ctypes.c_size_t, [model, inputs]),
            ("add_gradients", ctypes.c_double, [model, task, ctypes.POINTER(Arrays), Pointer]),
            ("compute_losses", None, [model, inputs, Pointer, Pointer, Pointer]),
            ("squared_norm", ctypes.c_double, [ctypes.c_size_t, Pointer]),
            ("adamw", None, [ctypes.c_int, update, ctypes.POINTER(AdamW), *[Pointer] * 4]),
            ("muon_size", ctypes.c_size_t, [ctypes.c_int] * 2),
            ("muon", None, [ctypes.c_int, ctypes.c_int, update, ctypes.POINTER(Muon), *[Pointer] * 4]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library: Any = library

    def add_gradients(self, model: "CpuModel", task: Task, gradients: "CpuModel", scratch: Scratch) -> float:
        """Adds the gradients of the task's loss; returns the sum of its targets' losses times their shares, in nats,
        without the part of the teachers."""
        targets, shares = np.ascontiguousarray(task.targets, np.int32), np.ascontiguousarray(task.shares, np.float32)
        teachers = (Model * len(task.teachers))(*(teacher.structure for teacher in task.teachers))
        teaching = _Teaching(len(teachers), task.alpha, task.temperature)
        # The second keeps arrays until the call has ended.
        inputs, _held = _inputs(task.inputs, task.kept, task.dropouts)
        given = _Task(inputs, targets.ctypes.data, shares.ctypes.data, teaching, teachers)
        memory = scratch.reserve(self._library.gradients_size(model.structure, given))
        loss: float = self._library.add_gradients(model.structure, given, gradients.structure.arrays, memory)
        return loss

    def losses(
        self, model: "CpuModel", inputs: NDArray[np.int32], targets: NDArray[np.int32], scratch: Scratch
    ) -> Floats:
        """Returns the cross-entropy of each target (B, T) given inputs (B, T), in nats."""
        targets = np.ascontiguousarray(targets, np.int32)
        losses = np.empty(targets.shape, np.float32)
        given, _held = _inputs(inputs, None, None)
        memory = scratch.reserve(self._library.losses_size(model.structure, given))
        self._library.compute_losses(model.structure, given, targets.ctypes.data, losses.ctypes.data, memory)
        return losses

    def squared_norm(self, array: Floats) -> float:
        """Returns the sum of the squares of an array's numbers."""
        result: float = self._library.squared_norm(array.size, array.ctypes.data)
        return result

    def adamw(self, update: Update, values: AdamW, gradients: Floats, weights: Floats, m: Floats, v: Floats) -> None:
        """Updates weights and moments (N,) in place."""
        arrays = (array.ctypes.data for array in (gradients, weights, m, v))
        self._library.adamw(gradients.size, update, values, *arrays)

    def muon(
        self, update: Update, values: Muon, gradients: Floats, weights: Floats, momenta: Floats, scratch: Scratch
    ) -> None:
        """Updates weights and momenta (R, S) in place."""
        memory = scratch.reserve(self._library.muon_size(*gradients.shape))
        arrays = (array.ctypes.data for array in (gradients, weights, momenta))
        self._library.muon(*gradients.shape, update, values, *arrays, memory)


def _inputs(
    tokens: NDArray[np.int32], kept: Floats | None, dropouts: "Dropouts | None"
) -> tuple[_Inputs, Sequence[object]]:
    """Returns a structure, and the arrays to which it points."""
    tokens = np.ascontiguousarray(tokens, np.int32)
    kept = None if kept is None else np.ascontiguousarray(kept, np.float32)
    addresses = None if kept is None else kept.ctypes.data, None if dropouts is None else ctypes.addressof(dropouts)
    return _Inputs(*tokens.shape, tokens.ctypes.data, *addresses), (tokens, kept, dropouts)


def load_library() -> TrainingLibrary:
    """Loads the library, once, and builds it for this processor in the cache of the accelerator if that is needed.

    Raises `FailedPrecondition` as `build_library` does.
    """
    with _loading:
        return _load()


def begin_loading() -> None:
    """Loads the library on another thread, because to build it takes seconds; an error comes when it is needed."""

    def load() -> None:
        with suppress(FailedPrecondition):
            load_library()

    threading.Thread(target=load, name="load-library", daemon=True).start()


# Evaluations and trainers have no common owner that could hold the library.
_loading = threading.Lock()


@cache
def _load() -> TrainingLibrary:
    return TrainingLibrary(build_library(_source(), VECTOR_OPTIONS, accelerator.prepared().cache))


def prebuild(folder: Path) -> None:
    """Builds the library for each kind of processor; raises `FailedPrecondition` as `prebuild_library` does."""
    prebuild_library(_source(), VECTOR_OPTIONS, folder)


def _source() -> str:
    return joined(VECTORS, *map(Path(__file__).with_name, _FILES))
