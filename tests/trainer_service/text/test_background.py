import threading
from collections.abc import Iterator

import pytest

from shared.errors import Unavailable
from trainer_service.text import background


def test_items_and_errors_pass_through_unchanged() -> None:
    def items() -> Iterator[int]:
        yield from range(100)
        raise KeyError("the end")

    seen = []
    with pytest.raises(KeyError, match="the end"):
        for item in background.iterate(items(), lambda: None):
            seen.append(item)
    assert seen == list(range(100))
    assert background.call(lambda: "one", lambda: None) == "one"


def test_the_caller_ticks_while_it_waits_and_can_abandon_the_work() -> None:
    ended, ticks = threading.Event(), []

    def tick() -> None:
        ticks.append(threading.current_thread())
        if len(ticks) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        background.call(ended.wait, tick)
    assert set(ticks) == {threading.current_thread()}
    ended.set()


def test_abandoned_work_ends_at_its_next_item() -> None:
    closed = threading.Event()

    def items() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    iterator = background.iterate(items(), lambda: None)
    assert next(iterator) == 1
    iterator.close()  # type: ignore[attr-defined]
    assert closed.wait(30)


def test_silence_ends_the_wait() -> None:
    ended = threading.Event()
    with pytest.raises(Unavailable, match="No data arrived for 0 s"):
        next(background.iterate((ended.wait() for _ in range(1)), lambda: None, 0.0))
    ended.set()
