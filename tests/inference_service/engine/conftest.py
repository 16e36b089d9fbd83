"""Fixtures for the tests of the engine."""

from collections.abc import Iterator

import pytest

from tests.inference_service.engine.harness import Harness


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    harness.add(1, seed=0)
    yield harness
    harness.engine.stop()
