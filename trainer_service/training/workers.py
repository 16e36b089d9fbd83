"""Threads that compute side by side on a CPU.

All of MLX's operations but products run on one core. But each thread has a stream of its own, so threads that each take
a part of the batch, with a BLAS of one thread, use every core for everything.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, Self, TypeVar

import mlx.core as mx

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """So many threads, the caller's own where it is one.

    Each thread has its own stream, random state and compiled functions. Arrays pass from one to another only once they
    are evaluated. The threads end with the context, and each gives up its stream before: MLX would abort the process.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "compute") if count > 1 else None

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the order of the items; raises what the function raises."""
        return list(self._pool.map(function, items) if self._pool else map(function, items))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool:
            # Nobody goes on before all are here, so that each takes one.
            together = Barrier(self.count)

            def give_up_stream(_: int) -> None:
                together.wait()
                mx.clear_streams()

            self.map(give_up_stream, range(self.count))
            self._pool.shutdown()
