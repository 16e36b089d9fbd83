"""Threads that compute in parallel on a CPU.

In MLX, every operation except matrix products uses one core per stream. Here each thread has its own stream, takes a
part of the batch and uses a single-threaded BLAS, so that all operations use all cores.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Self, TypeVar

import mlx.core as mx

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of `count` threads; a single one is the caller's thread.

    Each thread has its own stream, random state and compiled functions. Only evaluated arrays may pass between threads.
    The threads end with the context. Each clears its streams first, because MLX would abort the process otherwise.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "compute") if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """Returns the results in the order of the items; raises what the function raises."""
        return list(self._pool.map(function, items) if self._pool else map(function, items))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            # Makes each thread take exactly one call.
            barrier = Barrier(self.count)

            def clear_streams(_: int) -> None:
                barrier.wait()
                mx.clear_streams()

            self.map(clear_streams, range(self.count))
            self._pool.shutdown()
