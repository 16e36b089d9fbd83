"""The library that computes on a CPU: its structures and functions, and how it is built.

Shapes: R rows, K wanted rows, N outputs, C inputs, V vocabulary.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared.decoding.weight_format import WeightFormat
from shared.device.native import VECTOR_OPTIONS, VECTORS, build_library, joined, prebuild_library

_OPTIONS = (*VECTOR_OPTIONS, *(("-fopenmp",) if sys.platform == "linux" else ()))
# In the order in which they are joined.
_FILES = ("weights.h", "tiles.h", "products.h", "attention.h", "draws.h", "step.cpp")
# The numbers of the formats in `weights.h`.
FORMATS = {WeightFormat.FP32: 0, WeightFormat.BF16: 1, WeightFormat.INT8: 2}

CACHE_LINE = 64

Pointer = ctypes.c_void_p


class Product(ctypes.Structure):
    """Packed weights, a scale for each output if they are bytes, and perhaps a bias."""

    _fields_ = [(name, Pointer) for name in ("weight", "scales", "bias")]


class Norm(ctypes.Structure):
    """A LayerNorm."""

    _fields_ = [(name, Pointer) for name in ("weight", "bias")]


class Layer(ctypes.Structure):
    """A block of the model, with the keys and values of all slots."""

    _fields_ = [
        *(("attention_norm", Norm), ("qkv", Product), ("output", Product)),
        *(("feed_forward_norm", Norm), ("up", Product), ("down", Product)),
        *((name, Pointer) for name in ("keys", "values")),
    ]


class Model(ctypes.Structure):
    """A model."""

    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in ("format", "layers", "width", "hidden", "heads", "positions", "vocabulary", "threads")
        ),
        ("epsilon", ctypes.c_float),
        *(("tokens", Product), ("places", Pointer), ("norm", Norm), ("head", Product)),
        ("layer", ctypes.POINTER(Layer)),
    ]


class CpuLibrary:
    """The functions of `step.cpp`."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        integer, size, model = ctypes.c_int, ctypes.c_size_t, ctypes.POINTER(Model)
        for name, result, arguments in (
            ("vector_width", integer, []),
            ("has_tiles", integer, []),
            ("padded_size", integer, [integer]),
            ("packed_size", size, [integer, integer, integer]),
            ("pack_weights", None, [integer, integer, integer, *[Pointer] * 3]),
            ("scratch_size", size, [model, integer]),
            ("compute", None, [model, integer, *[Pointer] * 3, integer, *[Pointer] * 3]),
            ("draw", None, [integer, integer, integer, *[Pointer] * 5]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.vector_width: int = library.vector_width()
        self.has_tiles = bool(library.has_tiles())
        self.padded_size = library.padded_size
        self.scratch_size = library.scratch_size
        self.compute = library.compute
        self.draw = library.draw
        self._packed_size = library.packed_size
        self._pack = library.pack_weights

    def packed_size(self, weights: WeightFormat, shape: tuple[int, ...]) -> int:
        """Returns the bytes of a packed matrix (N, C), a multiple of a cache line."""
        size: int = self._packed_size(FORMATS[weights], *shape)
        return size + -size % CACHE_LINE

    def pack(
        self, weights: WeightFormat, matrix: NDArray[np.float32], packed: NDArray[np.uint8]
    ) -> NDArray[np.float32] | None:
        """Packs a matrix (N, C) into memory of zeros; returns the scales (N padded), if the format has scales."""
        N, C = matrix.shape
        scales = np.zeros(self.padded_size(N), np.float32)
        self._pack(FORMATS[weights], N, C, matrix.ctypes.data, packed.ctypes.data, scales.ctypes.data)
        return scales if weights is WeightFormat.INT8 else None


def load_library(cache: Path) -> CpuLibrary:
    """Loads the library, and builds it for this processor in the folder `cache` if that is needed.

    Raises `FailedPrecondition` as `build_library` does.
    """
    return CpuLibrary(build_library(_source(), _OPTIONS, cache))


def prebuild(folder: Path) -> None:
    """Builds the library for each kind of processor; raises `FailedPrecondition` as `prebuild_library` does."""
    prebuild_library(_source(), _OPTIONS, folder)


def _source() -> str:
    return joined(VECTORS, *map(Path(__file__).with_name, _FILES))
