"""Threads that compute in parallel on a CPU, each on one core, in libraries that release Python's lock."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of `count` threads, which end with the context; a single one is the caller's thread."""

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
            self._pool.shutdown()
