"""Runs work on a background thread, so that the caller stays responsive and can abandon the work.

Abandoned work ends at its next item; the process does not wait for it.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from shared.errors import Unavailable

T = TypeVar("T")

INTERVAL_S = 0.1
# The most items that wait for the caller.
_AHEAD = 4


def iterate(items: Iterable[T], tick: Callable[[], None], silence_s: float = float("inf")) -> Iterator[T]:
    """Yields the items of an iterable, which runs on a thread of its own, and raises its errors.

    Calls `tick` at least every `INTERVAL_S`; an exception from `tick` ends the iteration. Raises `Unavailable` if no
    item arrives for `silence_s`.
    """
    results: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(_AHEAD)
    abandoned = threading.Event()

    def put(result: tuple[T] | BaseException | None) -> bool:
        while not abandoned.is_set():
            with suppress(queue.Full):
                results.put(result, timeout=INTERVAL_S)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item,)):
                    return
        except BaseException as error:
            put(error)
        else:
            put(None)

    thread = threading.Thread(target=work, name="background", daemon=True)
    thread.start()
    last_item_s = time.monotonic()
    try:
        while True:
            tick()
            try:
                result = results.get(timeout=INTERVAL_S)
            except queue.Empty:
                if time.monotonic() - last_item_s > silence_s:
                    raise Unavailable(f"No data arrived for {silence_s:.0f} s.") from None
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result[0]
            last_item_s = time.monotonic()
    finally:
        abandoned.set()
        thread.join(2 * INTERVAL_S)


def call(work: Callable[[], T], tick: Callable[[], None]) -> T:
    """Runs a function on a thread of its own and returns its result or raises its error; calls `tick` while it runs."""
    (result,) = iterate((work() for _ in range(1)), tick)
    return result
