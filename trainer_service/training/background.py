"""Work on a thread of its own, so that the caller can look after other things meanwhile, and leave it.

Work that is left ends at its next item; the process does not wait for it.
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
# Items that wait for the caller.
_AHEAD = 4


def iterate(items: Iterable[T], tick: Callable[[], None], silence_s: float = float("inf")) -> Iterator[T]:
    """Yields what an iterable yields and raises what it raises; calls `tick` at least every `INTERVAL_S` meanwhile.

    What `tick` raises ends the iteration. Raises `Unavailable` if nothing came for `silence_s`.
    """
    results: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(_AHEAD)
    left = threading.Event()

    def put(result: tuple[T] | BaseException | None) -> bool:
        while not left.is_set():
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
    heard_s = time.monotonic()
    try:
        while True:
            tick()
            try:
                result = results.get(timeout=INTERVAL_S)
            except queue.Empty:
                if time.monotonic() - heard_s > silence_s:
                    raise Unavailable(f"Nothing came for {silence_s:.0f} s.") from None
                continue
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result[0]
            heard_s = time.monotonic()
    finally:
        left.set()
        thread.join(2 * INTERVAL_S)


def call(work: Callable[[], T], tick: Callable[[], None]) -> T:
    """Returns what a function returns and raises what it raises; calls `tick` as `iterate` does."""
    (result,) = iterate((work() for _ in range(1)), tick)
    return result
