import json
from dataclasses import asdict

import pytest

from tests.benchmarks.setup import Endpoint, Setup


@pytest.mark.parametrize("endpoint", [None, Endpoint("127.0.0.1:1", "http://127.0.0.1:8080", 2)])
def test_a_setup_survives_a_command_line(endpoint: Endpoint | None) -> None:
    setup = Setup("folder", slots=2, threads=1, endpoint=endpoint)
    assert Setup.from_dict(json.loads(json.dumps(asdict(setup)))) == setup
