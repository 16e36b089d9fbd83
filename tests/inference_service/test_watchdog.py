"""The health that the watchdog reports of an engine, which is as slow as a test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest

from inference_service import watchdog
from inference_service.engine.engine import Engine
from inference_service.pauses import LOOK_INTERVAL_S, Pauses
from inference_service.watchdog import Watchdog
from inference_service.write_timeouts import WriteTimeouts
from tests.asynchronous import async_test
from tests.waiting import eventually

STUCK_AFTER_S = 30.0


class Clock:
    """A clock that stands still until a test moves it."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class SlowEngine:
    """An engine whose step, or part of an examination, has taken as long as a test wants."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.busy_since: float | None = None
        self.examines = False

    def stall(self, seconds: float) -> None:
        self.busy_since = self._clock() - seconds if seconds else None


class Watched:
    """A watched engine; `health` lists the changes of health."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.engine = SlowEngine(self.clock)
        self.serves = False
        self.health: list[bool] = []
        self._looks = 0
        engine = cast(Engine, self.engine)
        pauses = Pauses(self.clock)
        self._watchdog = Watchdog(
            engine, self._look, self._set_serving, STUCK_AFTER_S, pauses, WriteTimeouts(10.0, pauses, self.clock)
        )

    def _look(self) -> bool:
        self._looks += 1
        return self.serves

    async def _set_serving(self, serving: bool) -> None:
        self.health.append(serving)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator["asyncio.Task[None]"]:
        """Runs the watchdog in a task."""
        watching = asyncio.create_task(self._watchdog.run())
        try:
            yield watching
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def looked(self) -> None:
        """Waits until the watchdog has seen the current state, and reported it."""
        seen = self._looks
        # It has reported one look when it takes the next.
        await eventually(lambda: self._looks >= seen + 2)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(watchdog, "LOOK_INTERVAL_S", 0.001)
    return Watched()


@async_test
async def test_health_is_serving_only_while_a_version_serves_and_no_step_is_slow(watched: Watched) -> None:
    async with watched.watching() as watching:
        for serves, stalled_s, expected in (
            (False, 0.0, []),
            (True, 0.0, [True]),
            (True, watchdog._SLOW_S - 0.01, [True]),
            (True, watchdog._SLOW_S + 0.01, [True, False]),
            (True, STUCK_AFTER_S, [True, False]),
            (True, 0.0, [True, False, True]),
            (False, 0.0, [True, False, True, False]),
            (False, 2 * watchdog._SLOW_S, [True, False, True, False]),
        ):
            watched.serves = serves
            watched.engine.stall(stalled_s)
            await watched.looked()
            assert watched.health == expected
        assert not watching.done()


def test_a_slow_step_shows_within_a_second() -> None:
    assert watchdog._SLOW_S + LOOK_INTERVAL_S < 1.0


@async_test
async def test_watching_ends_if_a_step_is_stuck(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    async with watched.watching() as watching:
        watched.serves = True
        watched.engine.stall(STUCK_AFTER_S)
        await watched.looked()
        assert not watching.done()
        watched.engine.examines = True
        watched.engine.stall(STUCK_AFTER_S + 0.1)
        await watched.looked()
        assert not watching.done()
        watched.engine.examines = False
        await eventually(watching.done)
        watching.result()
    assert watched.health == []
    assert "a step has taken 30.1 s" in caplog.text


@async_test
async def test_a_pause_of_the_process_is_not_a_slow_step(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    async with watched.watching() as watching:
        watched.serves = True
        watched.engine.stall(0.1)
        await watched.looked()
        watched.clock.now_s += 2 * STUCK_AFTER_S
        await watched.looked()
        assert (watching.done(), watched.health) == (False, [True])
        # The time before and after the pause counts.
        watched.clock.now_s += 0.9
        await watched.looked()
        assert (watching.done(), watched.health) == (False, [True, False])
    assert "the process was paused for 59.9 s" in caplog.text
