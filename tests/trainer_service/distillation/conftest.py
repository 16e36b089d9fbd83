from collections.abc import Iterator

import pytest

from tests.groq_service import GroqService


@pytest.fixture
def service() -> Iterator[GroqService]:
    with GroqService().running() as service:
        yield service
