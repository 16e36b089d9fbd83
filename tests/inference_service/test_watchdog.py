"""Health as the watchdog tells it, of an engine that is as slow as a test says."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from inference_service import watchdog
from inference_service.watchdog import Watchdog
from tests.inference_service.world import until

STUCK_AFTER_S = 30.0


class SlowEngine:
    """One whose step, or piece of an examination, has been under way for so long."""

    stalled_s = 0.0
    examines = False


class Watched:
    """An engine that is watched, whether a version serves, and what health became, one after another."""

    def __init__(self) -> None:
        self.engine = SlowEngine()
        self.serves = False
        self.health: list[bool] = []
        self._looks = 0
        engine: Any = self.engine
        self._watchdog = Watchdog(engine, self._look, self._set_serving, STUCK_AFTER_S)

    def _look(self) -> bool:
        self._looks += 1
        return self.serves

    async def _set_serving(self, serving: bool) -> None:
        self.health.append(serving)

    def run(self, test: Callable[["asyncio.Task[None]"], Coroutine[Any, Any, None]]) -> None:
        """Runs a test, which gets the watchdog's task."""

        async def body() -> None:
            watching = asyncio.create_task(self._watchdog.run())
            try:
                await test(watching)
            finally:
                watching.cancel()
                await asyncio.wait([watching])

        asyncio.run(body())

    async def looked(self) -> None:
        """Waits until the watchdog has seen how things are now, and has told it."""
        seen = self._looks
        # It has told what it saw in one look when it takes the next.
        await until(lambda: self._looks >= seen + 2)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(watchdog, "_INTERVAL_S", 0.001)
    return Watched()


def test_health_is_serving_only_while_a_version_serves_and_no_step_takes_long(watched: Watched) -> None:
    async def test(watching: "asyncio.Task[None]") -> None:
        for serves, stalled_s, expected in (
            (False, 0.0, []),
            (True, 0.0, [True]),
            (True, watchdog._SLOW_S - 0.01, [True]),
            (True, watchdog._SLOW_S, [True, False]),
            (True, STUCK_AFTER_S, [True, False]),
            (True, 0.0, [True, False, True]),
            (False, 0.0, [True, False, True, False]),
            (False, 2 * watchdog._SLOW_S, [True, False, True, False]),
        ):
            watched.serves, watched.engine.stalled_s = serves, stalled_s
            await watched.looked()
            assert watched.health == expected
        assert not watching.done()

    watched.run(test)


def test_a_step_that_takes_long_shows_within_a_second() -> None:
    assert watchdog._SLOW_S + watchdog._INTERVAL_S < 1.0


def test_watching_ends_once_a_step_has_taken_so_long_that_it_will_not_end(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(watching: "asyncio.Task[None]") -> None:
        watched.serves, watched.engine.stalled_s = True, STUCK_AFTER_S
        await watched.looked()
        assert not watching.done()
        watched.engine.stalled_s, watched.engine.examines = STUCK_AFTER_S + 0.1, True
        await watched.looked()
        assert not watching.done()
        watched.engine.examines = False
        await until(watching.done)
        watching.result()

    watched.run(test)
    assert watched.health == []
    assert "a step has taken 30.1 s" in caplog.text
