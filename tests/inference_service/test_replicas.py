"""Two replicas behind Envoy and by round robin: no call fails while one drains, or while secrets are renewed."""

from pathlib import Path

import pytest

from tests.asynchronous import async_test
from tests.envoy_process import MISSING, PROGRAM
from tests.fakes import TINY
from tests.soak.replicas import soak


@pytest.mark.slow
@pytest.mark.skipif(not PROGRAM.exists(), reason=MISSING)
@async_test
async def test_no_call_fails_while_replicas_drain_and_secrets_change(tmp_path: Path) -> None:
    load = await soak(tmp_path, TINY, streams=6, restarts=2, rotations=2, tokens=24)
    assert load.violations == []
    assert [(phase.restarts, phase.rotations) for phase in load.phases] == [(1, 1), (1, 1)]
